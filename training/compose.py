"""From a data set's images to those that a network sees: moved, placed on a canvas, laid over others.

Training makes them anew for each batch, on the device; what is measured on is made once, by a fixed seed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from training import data
from training.affine import CANVAS, like_affnist, pad, strongly
from training.config import TrainConfig
from training.data import DataError, Dataset, Layout, Split, on_light_ground, random_shift
from training.multimnist import MARGIN, pairs

CANVAS_MARGIN = (CANVAS - 28) // 2
LAYOUTS: dict[str, Layout] = {"translated-mnist": "canvas", "multimnist": "pairs"}
NAMES = [*data.IDX_SOURCES, *LAYOUTS, "affnist", "folder"]
MARGINS: dict[Layout, int] = {"plain": 0, "canvas": CANVAS_MARGIN, "pairs": MARGIN}
SHIFTS: dict[Layout, int] = {"plain": TrainConfig.max_shift, "canvas": CANVAS_MARGIN, "pairs": MARGIN}
"""Largest shift of a training image along each axis: the paper's, which just keeps a digit in its frame."""
TEST_SEED = 2017
TEST_PAIRS = 5
"""Images made of each test digit of MultiMNIST; the paper made 1000, of which these are a sample."""


@dataclass(frozen=True)
class Batch:
    """What one training step sees."""

    images: Tensor
    """(B, H, W[, 3]) uint8."""
    labels: Tensor
    """(B,), or (B, L) for images of L digits."""
    targets: Tensor
    """What is to be drawn: the images, or (B, L, H, W), each digit by itself."""

    def part(self, which: slice) -> "Batch":
        return Batch(self.images[which], self.labels[which], self.targets[which])


Compose = Callable[[Tensor, torch.Generator], Batch]
"""Indices (B,) into a data set's images -> the images made of them."""


def composer(dataset: Dataset, most: int, *, strong: bool = False) -> Compose:
    """Make batches of `dataset`, whose tensors lie where the generator does.

    Args:
        most: largest shift along each axis, in pixels.
        strong: augment strongly instead of by shifts, as ink on a plain ground stands it.
    """
    images, labels, layout = dataset.images, dataset.labels, dataset.layout
    if strong and layout != "plain":
        raise DataError(f"{dataset.name}: strong augmentation is for single digits in their own frame")
    inverted = strong and on_light_ground(images)

    def augment(chosen: Tensor, generator: torch.Generator) -> Tensor:
        if not strong:
            return random_shift(chosen, most, generator)
        if inverted:  # what strong augmentation brings in is dark
            return 255 - strongly(255 - chosen, generator)
        return strongly(chosen, generator)

    def compose(indices: Tensor, generator: torch.Generator) -> Batch:
        if layout == "pairs":
            made = pairs(images, labels, indices, generator, most)
            return Batch(made.images, made.labels, made.digits)
        chosen = pad(images[indices], CANVAS_MARGIN) if layout == "canvas" else images[indices]
        moved = augment(chosen, generator)
        return Batch(moved, labels[indices], moved)

    return compose


def as_seen(dataset: Dataset, seed: int = TEST_SEED, times: int = 1) -> Dataset:
    """The images of a data set to measure on: its own if they are plain, else made by `seed`.

    Args:
        times: how many of each image.
    """
    if dataset.layout == "plain":
        return dataset
    generator = torch.Generator(dataset.images.device).manual_seed(seed)
    compose = composer(dataset, SHIFTS[dataset.layout])
    indices = torch.arange(len(dataset), device=dataset.images.device).repeat(times)
    made = [compose(some, generator) for some in indices.split(1000)]
    several = dataset.layout == "pairs"
    return replace(
        dataset,
        layout="plain",
        images=torch.cat([batch.images for batch in made]),
        labels=torch.cat([batch.labels for batch in made]),
        digits=torch.cat([batch.targets for batch in made]) if several else None,
    )


def frame(dataset: Dataset) -> tuple[int, int, int]:
    """Height, width and channels of the images that a network for `dataset` sees."""
    height, width = dataset.images.shape[1:3]
    margin = 2 * MARGINS[dataset.layout]
    return height + margin, width + margin, 3 if dataset.images.ndim == 4 else 1


def load(name: str, split: Split, data_dir: Path | None = None, *, count: int | None = None) -> Dataset:
    """Load one split of any data set of `NAMES`: to train on, or complete to test on.

    Args:
        count: take the first so many images of the files alone.

    Raises:
        DataError: as `training.data.load`, and for `affnist`, which is a test alone.
    """
    if name == "affnist" and split == "train":
        raise DataError("affnist is only tested on; train on translated-mnist")
    base = "mnist" if name in LAYOUTS or name == "affnist" else name
    dataset = replace(data.load(base, split, data_dir), name=name, layout=LAYOUTS.get(name, "plain"))
    if count is not None:
        dataset = data.take(dataset, torch.arange(min(count, len(dataset))))
    if split == "train":
        return dataset
    if name == "affnist":
        generator = torch.Generator().manual_seed(TEST_SEED)
        made = [like_affnist(some, generator) for some in dataset.images.split(1000)]
        return replace(dataset, images=torch.cat(made))
    return as_seen(dataset, times=TEST_PAIRS if dataset.layout == "pairs" else 1)
