"""The figure of a sweep holds every drawing where its labels say."""

import numpy as np
import pytest

from service.figures import _label, sweep_figure


@pytest.mark.parametrize("colour", [(), (3,)])
def test_every_drawing_is_in_its_row_and_column(colour: tuple[int, ...]) -> None:
    """Each tile of the grid has its drawing's level, rows by dimension and columns by delta."""
    levels = np.linspace(0.1, 0.9, 6, dtype=np.float32).reshape(2, 3)
    drawn = np.broadcast_to(levels.reshape(2, 3, *[1] * (2 + len(colour))), (2, 3, 28, 28, *colour))
    figure = sweep_figure(drawn, "title", [4, 7], [-0.1, 0, 0.1])
    tiles = figure[48:, 48:].reshape(2, 58, 3, 58, *colour)[:, :56, :, :56]
    expected = np.rint(levels * 255)
    assert (tiles.min(axis=(1, 3)) == expected.reshape(2, 3, *[1] * len(colour))).all()
    assert (tiles.max(axis=(1, 3)) == expected.reshape(2, 3, *[1] * len(colour))).all()


@pytest.mark.parametrize(("height", "width", "zoom"), [(10, 20, 2), (20, 10, 2), (80, 30, 1), (30, 80, 1)])
def test_drawings_that_are_not_square(height: int, width: int, zoom: int) -> None:
    """Whole zooming brings their larger side up to 56 pixels; a larger one stays as it is."""
    levels = np.linspace(0.1, 0.9, 6, dtype=np.float32).reshape(2, 3)
    drawn = np.broadcast_to(levels[..., None, None], (2, 3, height, width))
    grid = sweep_figure(drawn, "", [4, 7], [-0.1, 0, 0.1])[48:, 48:]
    down, across = height * zoom, width * zoom
    tiles = grid.reshape(2, down + 2, 3, across + 2)
    expected = np.broadcast_to(np.rint(levels * 255)[:, None, :, None], (2, down, 3, across))
    np.testing.assert_array_equal(tiles[:, :down, :, :across], expected)
    assert (tiles[:, down:] == 255).all()
    assert (tiles[..., across:] == 255).all()


def test_deltas_are_written_out() -> None:
    """Deltas that differ in their third digit have different labels."""
    drawn = np.ones((1, 1, 28, 28), np.float32)
    one, two = (sweep_figure(drawn, "", [0], [delta]) for delta in (0.125, 0.12))
    assert (one[:48] != two[:48]).any()


def test_names_stand_before_the_numbers() -> None:
    """Names widen the margin on the left alone, by as much as the longest takes."""
    drawn = np.zeros((2, 3, 28, 28), np.float32)
    plain = sweep_figure(drawn, "title", [4, 7], [-0.1, 0, 0.1])
    short = sweep_figure(drawn, "title", [4, 7], [-0.1, 0, 0.1], ["width", "slant"])
    named = sweep_figure(drawn, "title", [4, 7], [-0.1, 0, 0.1], ["width, slant and top left part", "slant"])
    assert plain.shape[0] == named.shape[0]
    assert plain.shape[1] < short.shape[1] < named.shape[1]
    assert (named[48:, -3 * 58 :] == plain[48:, -3 * 58 :]).all(), "the drawings are where they were"
    margin = named[48:, : -3 * 58]
    assert (margin[:, :2] == 255).all()
    assert (margin[:, -2:] == 255).all()
    assert (margin[:58] < 128).sum() > (margin[58:] < 128).sum() > 0


def test_the_labels_are_drawn() -> None:
    """Title, deltas and dimensions leave ink in the margins, and other labels leave other ink."""
    drawn = np.ones((2, 3, 28, 28), np.float32)
    one = sweep_figure(drawn, "one", [0, 1], [-0.1, 0, 0.1])
    two = sweep_figure(drawn, "one", [0, 2], [-0.1, 0, 0.2])
    for figure in (one, two):
        assert (figure[:48] < 128).any()
        assert (figure[48:, :48] < 128).any()
    assert (one[:48] != two[:48]).any()
    assert (one[48:106, :48] == two[48:106, :48]).all()
    assert (one[106:, :48] != two[106:, :48]).any()


def test_no_label_is_cut() -> None:
    """The lowest letters end above the label's edge, where the next drawing may begin."""
    label = _label("gjpqy")
    assert (label < 128).any()
    assert (label[-2:] == 255).all()
