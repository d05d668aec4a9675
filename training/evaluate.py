"""How well a network classifies and reconstructs a data set."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from training.data import DataError, Dataset
from training.losses import mistaken, named
from training.predictor import Predictor

MOST_PIXELS = 250 * 28 * 28
"""Of a batch: what a network needs for an image grows with them, and 250 of MNIST's are as fast as more."""


@dataclass(frozen=True)
class Evaluation:
    """What a network made of each image of a data set, M images in all."""

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    """Index of the longest capsule, (M,); for labels (M, L), of the L longest in ascending order, (M, L)."""
    reconstruction_errors: NDArray[np.float32]
    """Summed squared error of the reconstruction from the longest capsule, (M,); empty without a decoder."""
    lengths: NDArray[np.float32]
    """Capsule lengths, (M, K)."""

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def mistakes(self) -> int:
        return int(self.wrong.sum())

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """Whether each image is misclassified, (M,); of several labels, all must be found."""
        wrong: NDArray[np.bool_] = mistaken(
            torch.from_numpy(self.predictions), torch.from_numpy(self.labels)
        ).numpy()
        return wrong

    @property
    def error(self) -> float:
        """Share of misclassified images, in per cent."""
        return 100 * self.mistakes / self.images


def evaluate(predictor: Predictor, dataset: Dataset, most_pixels: int = MOST_PIXELS) -> Evaluation:
    """Classify and reconstruct every image; the labels are only compared with, never shown to the network.

    Args:
        most_pixels: of the images that are looked at together, unless one alone has more.

    Raises:
        DataError: if the images or classes are not those that the network takes.
    """
    require_fit(predictor, dataset)
    labels = dataset.labels.cpu()
    predictions: list[NDArray[np.int64]] = []
    errors = [np.empty(0, np.float32)]
    all_lengths: list[NDArray[np.float32]] = []
    batch_size = max(1, most_pixels // math.prod(predictor.image_shape[:2]))
    for start in range(0, len(dataset), batch_size):
        images = dataset.images[start : start + batch_size].cpu().numpy()
        capsules, lengths = predictor.encode(images)
        predictions.append(named(torch.from_numpy(lengths), labels).numpy())
        all_lengths.append(lengths)
        if predictor.draws:
            difference = predictor.decode(capsules, lengths.argmax(axis=-1)) - images / np.float32(255)
            errors.append(np.square(difference).reshape(len(images), -1).sum(axis=-1))
    return Evaluation(
        labels.numpy(), np.concatenate(predictions), np.concatenate(errors), np.concatenate(all_lengths)
    )


def require_fit(predictor: Predictor, dataset: Dataset) -> None:
    """Raise `DataError` if `dataset` is not one that the network can be asked about."""
    shape = tuple(dataset.images.shape[1:])
    if shape != predictor.image_shape:
        raise DataError(
            f"{dataset.name}: images of shape {shape}, but the network takes {predictor.image_shape}; "
            "choose the data set that it was trained on"
        )
    if dataset.classes != predictor.classes:
        raise DataError(
            f"{dataset.name}: classes {list(dataset.classes)}, "
            f"but the network knows {list(predictor.classes)}"
        )
