import numpy as np
import pytest

from training.outliers import outliers


@pytest.mark.parametrize("shape", [(28, 28), (40, 36), (32, 32, 3)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """Each kind comes in the number, size and colour asked for."""
    kinds = outliers(shape, 5)
    assert list(kinds) == ["noise", "blank pages", "letters", "garments"]
    for pictures in kinds.values():
        assert pictures.shape == (5, *shape)
        assert pictures.dtype == np.uint8


def test_pictures_differ() -> None:
    """No picture of a kind is like another, the same seed gives the same, and another seed others."""
    first, same, other = outliers((28, 28), 20), outliers((28, 28), 20), outliers((28, 28), 20, seed=1)
    for kind, pictures in first.items():
        assert len({picture.tobytes() for picture in pictures}) == 20
        assert np.array_equal(pictures, same[kind])
        assert not np.array_equal(pictures, other[kind])


def test_light_ink_on_dark_ground() -> None:
    """Letters and garments are light, lie inside the frame, and leave most of it dark."""
    kinds = outliers((28, 28), 50)
    for kind in ("letters", "garments"):
        pictures = kinds[kind].astype(float)
        assert pictures.reshape(50, -1).max(axis=1).min() > 100
        assert pictures[:, 0].mean() < 10
        assert pictures.mean() < 128
