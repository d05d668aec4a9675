"""How well a network classifies and reconstructs a data set."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data import DataError, Dataset
from training.predictor import Predictor


@dataclass(frozen=True)
class Evaluation:
    """What a network made of each image of a data set, M images in all."""

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    """Index of the longest capsule, (M,)."""
    reconstruction_errors: NDArray[np.float32]
    """Summed squared error of the reconstruction from the longest capsule, (M,)."""
    lengths: NDArray[np.float32]
    """Capsule lengths, (M, K)."""

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def mistakes(self) -> int:
        return int((self.predictions != self.labels).sum())

    @property
    def error(self) -> float:
        """Share of misclassified images, in per cent."""
        return 100 * self.mistakes / self.images


def evaluate(predictor: Predictor, dataset: Dataset, batch_size: int = 250) -> Evaluation:
    """Classify and reconstruct every image; the labels are only compared with, never shown to the network.

    Raises:
        DataError: if the images or classes are not those that the network takes.
    """
    require_fit(predictor, dataset)
    predictions, errors, all_lengths = [], [], []
    for start in range(0, len(dataset), batch_size):
        images = dataset.images[start : start + batch_size].cpu().numpy()
        capsules, lengths = predictor.encode(images)
        longest = lengths.argmax(axis=-1)
        difference = predictor.decode(capsules, longest) - images / np.float32(255)
        predictions.append(longest)
        errors.append(np.square(difference).reshape(len(images), -1).sum(axis=-1))
        all_lengths.append(lengths)
    found = (np.concatenate(parts) for parts in (predictions, errors, all_lengths))
    return Evaluation(dataset.labels.cpu().numpy(), *found)


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
