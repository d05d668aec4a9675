"""Drawings whose measures are known because they were drawn to measure."""

import numpy as np
import pytest
from numpy.typing import NDArray

from training.morphology import MEASURES, measure


def bar(width: float = 4, height: float = 20, shear: float = 0, level: float = 1) -> NDArray[np.float32]:
    """A bar about the middle of 28 x 28 pixels, `shear` pixels further right with each row downwards."""
    y, x = np.indices((28, 28)) + 0.5
    from_middle = np.abs(x - 14 - shear * (y - 14))
    inside = np.clip(width / 2 - from_middle + 0.5, 0, 1) * np.clip(height / 2 - np.abs(y - 14) + 0.5, 0, 1)
    drawing: NDArray[np.float32] = (level * inside).astype(np.float32)
    return drawing


def of(drawing: NDArray[np.float32]) -> dict[str, float]:
    return dict(zip(MEASURES, measure(drawing[np.newaxis])[0].tolist(), strict=True))


def test_an_upright_bar() -> None:
    """Thickness is the bar's width; width and height are what the middle 96 % of its ink takes."""
    found = of(bar())
    assert found["thickness"] == pytest.approx(4, abs=0.3)
    assert found["slant"] == pytest.approx(0, abs=0.1)
    assert found["width"] == pytest.approx(0.96 * 4, abs=0.3)
    assert found["height"] == pytest.approx(0.96 * 20, abs=0.3)
    assert found["ink"] == pytest.approx(4 * 20, rel=1e-5)
    assert (found["across"], found["down"]) == pytest.approx((14, 14), abs=1e-6)


@pytest.mark.parametrize("times", [2, 4])
def test_a_larger_drawing(times: int) -> None:
    """Of an image with so many times the pixels every length is so many times as long."""
    small, large = of(bar()), of(np.kron(bar(), np.ones((times, times), np.float32)))
    for name in ("thickness", "width", "height", "across", "down"):
        assert large[name] == pytest.approx(times * small[name], rel=0.08), name
    assert large["slant"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("more", [1, 2, 3])
def test_a_thicker_bar(more: int) -> None:
    """A pixel more of width is one more of thickness, and no slant and hardly any height."""
    thin, thick = of(bar(3)), of(bar(3 + more))
    assert thick["thickness"] - thin["thickness"] == pytest.approx(more, abs=0.1)
    assert thick["slant"] == pytest.approx(thin["slant"], abs=0.1)
    assert thick["height"] == pytest.approx(thin["height"], abs=0.6)


@pytest.mark.parametrize("shear", [-0.5, -0.2, 0.3, 0.5])
def test_a_sheared_bar(shear: float) -> None:
    """Its slant is the angle of the shear, to the right where it goes left downwards; its width stays."""
    found = of(bar(shear=shear))
    assert found["slant"] == pytest.approx(-np.degrees(np.arctan(shear)), abs=0.7)
    assert found["width"] == pytest.approx(of(bar())["width"], abs=0.7)
    assert found["height"] == pytest.approx(of(bar())["height"], abs=0.3)


def test_a_moved_bar() -> None:
    """The ink's centre of mass goes with the bar, and nothing else changes."""
    still, moved = of(bar(height=12)), of(np.roll(bar(height=12), (2, -3), axis=(0, 1)))
    assert moved.pop("across") - still.pop("across") == pytest.approx(-3)
    assert moved.pop("down") - still.pop("down") == pytest.approx(2)
    assert moved == pytest.approx(still)


def test_a_dim_bar_has_the_same_shape() -> None:
    """Ink is what is lighter than halfway between the darkest and the lightest pixel."""
    full, dim = of(bar()), of(bar(level=0.25))
    assert dim.pop("ink") == pytest.approx(full.pop("ink") / 4)
    assert dim == pytest.approx(full, abs=1e-3)


def test_drawings_do_not_touch_one_another() -> None:
    """Drawings that reach their borders are measured together as each alone."""
    drawings = np.stack([bar(28, 28), bar(6, 28), bar(28, 5)])
    np.testing.assert_allclose(measure(drawings), [measure(one[np.newaxis])[0] for one in drawings])


@pytest.mark.parametrize("level", [0, 0.5])
def test_no_ink(level: float) -> None:
    """A drawing of one shade has no shape."""
    found = of(np.full((28, 28), level, np.float32))
    assert found.pop("ink") == pytest.approx(level * 28 * 28)
    assert np.isnan(list(found.values())).all()
