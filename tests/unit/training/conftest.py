"""Small networks and images, so that a whole training run takes a second."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split

# These networks are far too small to share between threads, which would only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    return ModelConfig(
        classes=("bar", "pole", "dot"),
        height=13,
        width=12,
        conv_channels=16,
        kernel_size=5,
        primary_groups=8,
        primary_dimensions=8,
        digit_dimensions=6,
        decoder_units=(16, 24),
    )


@pytest.fixture(scope="session")
def train_config() -> TrainConfig:
    return TrainConfig(
        epochs=3,
        batch_size=16,
        learning_rate=2e-2,
        final_learning_rate=2e-3,
        max_shift=1,
        validation_images=6,
        device="cpu",
    )


@pytest.fixture(scope="session")
def load_split(model_config: ModelConfig) -> Callable[[Split], Dataset]:
    """Bars, poles and dots of random brightness at random places: easy, but not the same image twice."""

    def load(split: Split, count: int = 66) -> Dataset:
        generator = torch.Generator().manual_seed(len(split))
        images = torch.zeros(count, model_config.height, model_config.width, dtype=torch.uint8)
        labels = torch.arange(count) % 3
        for image, label in zip(images, labels, strict=True):
            row, column = torch.randint(3, 8, (2,), generator=generator).tolist()
            size = {0: (2, 6), 1: (6, 2), 2: (3, 3)}[int(label)]
            brightness = torch.randint(150, 256, (1,), generator=generator).item()
            image[row : row + size[0], column - 2 : column - 2 + size[1]] = brightness
        return Dataset("shapes", model_config.classes, images, labels, {split: f"{split} shapes"})

    return load


@pytest.fixture
def mnist_style_folder(tmp_path: Path) -> Path:
    """A folder-per-class data set of 17x17 images, the smallest that the paper's kernels take."""
    for split in ("train", "test"):
        for label, box in (("bar", (3, 7, 14, 10)), ("pole", (7, 3, 10, 14))):
            folder = tmp_path / "shapes" / split / label
            folder.mkdir(parents=True)
            for i in range(6):
                image = Image.new("L", (17, 17))
                image.paste(255 - 10 * i, box)
                image.save(folder / f"{i}.png")
    return tmp_path / "shapes"
