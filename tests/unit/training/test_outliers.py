from typing import Any

import numpy as np
import pytest
from PIL import ImageDraw

from training.outliers import GARMENTS, LETTERS, outliers


@pytest.mark.parametrize("shape", [(28, 28), (40, 36), (32, 32, 3)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """Each kind comes in the number, size and colour asked for."""
    kinds = outliers(shape, 5)
    assert list(kinds) == ["noise", "blank pages", "letters", "garments"]
    for images in kinds.values():
        assert images.shape == (5, *shape)
        assert images.dtype == np.uint8


def test_images_differ() -> None:
    """No image of a kind is like another, the same seed gives the same, and another seed others."""
    first, same, other = outliers((28, 28), 20), outliers((28, 28), 20), outliers((28, 28), 20, seed=1)
    for kind, images in first.items():
        assert len({image.tobytes() for image in images}) == 20
        assert np.array_equal(images, same[kind])
        assert not np.array_equal(images, other[kind])


def test_light_ink_on_dark_ground() -> None:
    """Letters and garments are light, lie inside the frame, and leave most of it dark."""
    kinds = outliers((28, 28), 50)
    for kind in ("letters", "garments"):
        images = kinds[kind].astype(float)
        assert images.reshape(50, -1).max(axis=1).min() > 100
        assert images[:, 0].mean() < 10
        assert images.mean() < 128


def test_blank_pages_are_of_every_shade() -> None:
    """From nearly black to nearly white, each as even as a camera's, at the ends of the scale as well."""
    pages = outliers((28, 28), 60)["blank pages"].astype(float)
    shades = pages.mean(axis=(1, 2))
    assert shades.min() < 20
    assert shades.max() > 235
    assert pages.std(axis=(1, 2)).max() < 4


def test_letters_are_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """All letters are drawn, lightly and in the middle of frames of any shape."""
    drawn: list[tuple[str, int]] = []
    draw = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: tuple[float, float], letter: str, **options: Any) -> None:
        drawn.append((letter, options["fill"]))
        draw(self, place, letter, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    letters = outliers((28, 60), 200)["letters"]
    assert {letter for letter, _ in drawn} == set(LETTERS)
    assert min(fill for _, fill in drawn) >= 200
    assert not letters[:, :, :12].any()
    assert not letters[:, :, -12:].any()


def test_garments_are_of_several_forms() -> None:
    """Some fill half of their bounding box, some nearly all of it; one outline comes in many widths."""
    filled = []
    for image in outliers((28, 28), 50)["garments"]:
        ink = image > 0
        filled.append(ink.sum() / (ink.any(axis=0).sum() * ink.any(axis=1).sum()))
    assert min(filled) < 0.6
    assert max(filled) > 0.8
    wide = outliers((28, 204), 50)["garments"].any(axis=1).sum(axis=1)
    assert len(set(wide)) > 2 * len(GARMENTS)
