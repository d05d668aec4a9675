"""The real MNIST test images, where this machine has them."""

import os
from pathlib import Path

import pytest

from training import data
from training.data import DataError, Dataset

ROOT = Path(__file__).parents[2]


def mnist_test_images() -> Dataset:
    """The 10,000 test images, or a skip with the reason: tests download nothing."""
    beside = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("CAPSNET_DATA_DIR", beside if beside.is_dir() else ROOT / "data"))
    try:
        return data.load("mnist", "test", folder, download=False)
    except DataError as error:
        pytest.skip(f"MNIST is not on this machine; set CAPSNET_DATA_DIR ({error})")
