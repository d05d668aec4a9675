"""A captured step is the step. Skipped without a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training import captured, train
from training.checkpoint import Checkpoint
from training.config import ModelConfig, TrainConfig
from training.data import Dataset
from training.train import train as run_training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")

CONFIG = TrainConfig(epochs=5, batch_size=32, validation_images=0, device="cuda")
SHAPE = ModelConfig(("a", "b", "c"))


def dataset() -> Dataset:
    """A hundred bright images, three batches and a rest of four."""
    labels = torch.arange(100) % 3
    images = torch.randint(
        0, 80, (100, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for label in range(3):
        images[labels == label, 8 * label : 8 * label + 10] += 120
    return Dataset("stripes", ("a", "b", "c"), images, labels, {})


def weights(
    output: Path, after_epoch: Callable[[Checkpoint], None] = lambda _: None, *, resume: bool = False
) -> dict[str, torch.Tensor]:
    state = run_training(
        dataset(), SHAPE, CONFIG, output, load_test=dataset, resume=resume, after_epoch=after_epoch
    )
    return state.model


def test_it_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights after five epochs, full batches and the short last one: equal to the bit, captured or not."""
    with_graphs = weights(tmp_path / "captured")
    monkeypatch.setattr(captured, "WARM_UP", 10**6)
    without = weights(tmp_path / "plain")
    for name, value in with_graphs.items():
        torch.testing.assert_close(value, without[name], rtol=0, atol=0)


def test_it_resumes_the_same(tmp_path: Path) -> None:
    """A run that was interrupted after its third epoch ends with the same weights to the bit."""
    whole = weights(tmp_path / "whole")

    def interrupt(state: Checkpoint) -> None:
        if state.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "parts", interrupt)
    resumed = weights(tmp_path / "parts", resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(value, resumed[name], rtol=0, atol=0)


def test_the_rate_is_set(tmp_path: Path) -> None:
    """A captured step learns at the schedule's rate, not at the one it was captured with."""
    network, optimizer = train._network(SHAPE, CONFIG, None, torch.device("cuda"))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    train._set_rate(optimizer, 0.0)
    before = [parameter.clone() for parameter in network.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
