"""A captured step is the step. Skipped without a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training import captured
from training.checkpoint import Checkpoint
from training.config import Architecture, ModelConfig, TrainConfig
from training.data import Dataset
from training.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")

CONFIG = TrainConfig(epochs=5, batch_size=32, validation_images=0, device="cuda")
CLASSES = ("a", "b", "c")
SHAPE = ModelConfig(CLASSES)


def dataset() -> Dataset:
    """A hundred bright images, three batches and a rest of four."""
    labels = torch.arange(100) % 3
    images = torch.randint(
        0, 80, (100, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for label in range(3):
        images[labels == label, 8 * label : 8 * label + 10] += 120
    return Dataset("stripes", CLASSES, images, labels, {})


def weights(
    output: Path,
    shape: ModelConfig = SHAPE,
    after_epoch: Callable[[Checkpoint], None] = lambda _: None,
    *,
    resume: bool = False,
) -> dict[str, torch.Tensor]:
    state = train(dataset(), shape, CONFIG, output, load_test=dataset, resume=resume, after_epoch=after_epoch)
    return state.model


@pytest.mark.parametrize("architecture", ["capsnet", "baseline-cnn", "efficient-capsnet"])
def test_it_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: Architecture
) -> None:
    """Weights after five epochs, with dropout and batch statistics too: equal to the bit, captured or not."""
    shape = ModelConfig(CLASSES, architecture=architecture)
    with_graphs = weights(tmp_path / "captured", shape)
    monkeypatch.setattr(captured, "WARM_UP", 10**6)
    without = weights(tmp_path / "plain", shape)
    for name, value in with_graphs.items():
        torch.testing.assert_close(value, without[name], rtol=0, atol=0)


def test_it_resumes_the_same(tmp_path: Path) -> None:
    """A run that was interrupted after its third epoch ends with the same weights to the bit."""
    whole = weights(tmp_path / "whole")

    def interrupt(state: Checkpoint) -> None:
        if state.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "parts", after_epoch=interrupt)
    resumed = weights(tmp_path / "parts", resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(value, resumed[name], rtol=0, atol=0)
