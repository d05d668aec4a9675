import numpy as np
import pytest

from training.outliers import outliers


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
