from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.data import DataError, Dataset
from training.evaluate import evaluate


class Brightest:
    """Says class 1 for images whose first pixel is bright, and draws a half-grey image of anything."""

    classes = ("dark", "bright")
    draws = True

    def __init__(self) -> None:
        self.image_shape = (2, 2)
        self.seen: list[NDArray[np.uint8]] = []
        self.drawn: list[int] = []
        self.batches: list[int] = []

    def encode(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.seen.extend(images)
        self.batches.append(len(images))
        bright = (images[:, 0, 0] > 127).astype(np.float32)
        lengths = np.stack([1 - bright, bright], axis=1)
        return lengths[..., None], lengths

    def decode(self, capsules: NDArray[np.float32], target: NDArray[np.int64]) -> NDArray[np.float32]:
        self.drawn.extend(target.tolist())
        return np.full((len(capsules), *self.image_shape), 0.5, dtype=np.float32)


@pytest.fixture
def dataset() -> Dataset:
    images = torch.zeros(5, 2, 2, dtype=torch.uint8)
    images[3:] = 255
    return Dataset("pairs", Brightest.classes, images, torch.tensor([0, 1, 0, 1, 1]), {})


def test_error_by_hand(dataset: Dataset) -> None:
    """One image in five is labelled otherwise than predicted: 20 % error, one mistake."""
    result = evaluate(Brightest(), dataset, most_pixels=8)
    assert result.predictions.tolist() == [0, 0, 0, 1, 1]
    assert (result.images, result.mistakes, result.error) == (5, 1, 20.0)
    assert result.reconstruction_errors.tolist() == [1.0] * 5


def test_labels_do_not_leak(dataset: Dataset) -> None:
    """The labels change the count of mistakes and nothing else: the mask is the prediction's."""
    predictor = Brightest()
    wrong = Dataset(dataset.name, dataset.classes, dataset.images, 1 - dataset.labels, {})
    first, second = evaluate(predictor, dataset), evaluate(predictor, wrong)
    assert predictor.drawn == [0, 0, 0, 1, 1] * 2
    assert first.predictions.tolist() == second.predictions.tolist()
    assert second.mistakes == 4


def test_images_are_not_augmented(dataset: Dataset) -> None:
    """The network is shown every image once, in order, as it is."""
    predictor = Brightest()
    images = torch.arange(60, dtype=torch.uint8).reshape(5, 2, 6)[:, :, ::3]  # moving any would show
    evaluate(predictor, replace(dataset, images=images), most_pixels=8)
    assert np.array_equal(np.stack(predictor.seen), images.numpy())


@pytest.mark.parametrize(("side", "together"), [(28, 250), (64, 47), (500, 1)])
def test_large_images_are_looked_at_in_smaller_batches(side: int, together: int) -> None:
    """Of MNIST's size 250 at a time, of larger images as many as have no more pixels, and at least one."""
    predictor = Brightest()
    predictor.image_shape = (side, side)
    images = torch.zeros(together + 1, 1, 1, dtype=torch.uint8).expand(-1, side, side)
    evaluate(predictor, Dataset("large", predictor.classes, images, torch.zeros(together + 1).long(), {}))
    assert predictor.batches == [together, 1]


def test_images_of_another_size(dataset: Dataset) -> None:
    """Images that the network cannot take, and classes that it does not know, are refused with both sides."""
    large = replace(dataset, images=torch.zeros(5, 3, 2, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"shape \(3, 2\), but the network takes \(2, 2\)"):
        evaluate(Brightest(), large)
    with pytest.raises(DataError, match=r"classes \['a', 'b'\], but the network knows \['dark', 'bright'\]"):
        evaluate(Brightest(), replace(dataset, classes=("a", "b")))
