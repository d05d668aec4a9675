"""Training in several processes gives what one gives."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training import checkpoint as checkpoints
from training.checkpoint import Checkpoint
from training.cli import main
from training.compose import Batch
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split
from training.model import CapsNet
from training.parallel import Processes
from training.train import step_of

ROOT = Path(__file__).parents[3]


def test_parts() -> None:
    """The parts of a batch are disjoint, complete, and differ in size by one at most."""
    for size in (0, 1, 2, 7, 128):
        for count in (1, 2, 3, 8):
            parts = [list(range(size))[Processes(rank, count).part(size)] for rank in range(count)]
            assert [index for part in parts for index in part] == list(range(size))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_unequal_parts_weigh_by_their_images(
    model_config: ModelConfig, train_config: TrainConfig, load_split: Callable[[Split], Dataset]
) -> None:
    """Of three images one process has one, another two: the mean of their gradients is that of all three."""
    network = CapsNet(model_config)
    images, labels = load_split("train").images[:3], torch.arange(3)

    def gradients(team: Processes) -> torch.Tensor:
        optimizer = torch.optim.SGD(network.parameters(), lr=0)
        update = step_of(network, optimizer, train_config, torch.zeros(3), team)
        update(Batch(images, labels, images).part(team.part(3)), 3)
        return torch.cat(
            [weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]
        )

    apart = torch.stack([gradients(Processes(rank, 2)) for rank in range(2)])
    torch.testing.assert_close(apart.mean(dim=0), gradients(Processes()))


def test_two_processes_do_as_one(
    mnist_style_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, going on after one's first epoch, end with one process's weights and losses.

    Both see the same permutation and shifts; what differs is the order in which gradients are added, which
    Adam lets grow. Seen here: weights apart by less than 1e-5 at a rate of 1e-3.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ["--dataset", "folder", "--data-dir", str(mnist_style_folder), "--validation-images", "1"]
    settings += ["--batch-size", "4", "--device", "cpu", "--share-weights", "--resume", "--epochs", "2"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together += ["-m", "training.cli", "train", *settings, "--output", str(tmp_path / "two")]

    def interrupted(state: Checkpoint, path: Path) -> None:
        save(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        save = checkpoints.save
        patch.setattr(checkpoints, "save", interrupted)
        assert main(["train", *settings, "--output", str(tmp_path / "two")]) == 130
    assert checkpoints.read(tmp_path / "two").epoch == 1
    assert main(["train", *settings, "--output", str(tmp_path / "one")]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(  # noqa: S603 - this test's own words
        together, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Resuming") == done.stdout.count("epoch 2/2") == 1, "one of them prints"
    one, both = checkpoints.read(tmp_path / "one"), checkpoints.read(tmp_path / "two")
    assert both.epoch == one.epoch == 2
    for key in ("margin_loss", "reconstruction_loss", "training_error"):
        found, expected = ([row[key] for row in state.history] for state in (both, one))
        assert found == pytest.approx(expected, rel=1e-4), key
    for name, weight in one.model.items():
        torch.testing.assert_close(both.model[name], weight, atol=1e-4, rtol=0, msg=name)
    assert torch.equal(both.generators["shift"], one.generators["shift"])
