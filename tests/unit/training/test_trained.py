"""Networks by their path: what comes out is what was trained, or a reason why not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from service.manifest import ManifestError, read_manifest
from training import checkpoint as checkpoints
from training import trained
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split
from training.export import Name, export
from training.predictor import OnnxPredictor, TorchPredictor
from training.start import read_start
from training.train import train
from training.trained import open_trained, read_network

Load = Callable[[Split], Dataset]
Make = Callable[..., tuple[Path, Path]]


@pytest.fixture
def make(model_config: ModelConfig, train_config: TrainConfig, load_split: Load, tmp_path: Path) -> Make:
    """Train and export a network with some settings of its own: the run's folder and the model's."""

    def make(**changes: object) -> tuple[Path, Path]:
        config = ModelConfig.from_dict({**model_config.as_dict(), **changes})
        schedule = replace(train_config, epochs=2)
        run, place = tmp_path / "a-run", Name(tmp_path / "models", "shapes", "3")
        state = train(load_split("train"), config, schedule, run, load_test=lambda: load_split("test"))
        export(state, place, load_split)
        return run, place.folder

    return make


@pytest.mark.parametrize(
    ("changes", "iterations"),
    [
        ({}, 3),
        ({"shared_weights": True, "routing_iterations": 2}, 2),
        ({"capsule_biases": True, "conv_channels": 8, "kernel_size": 4, "primary_groups": 4}, 3),
        ({"architecture": "efficient-capsnet"}, 1),
    ],
)
def test_an_exported_model_becomes_a_network(
    changes: dict[str, object], iterations: int, make: Make, load_split: Load
) -> None:
    """The network made of an exported model sees and draws what the graphs do, whatever its shape."""
    _, folder = make(**changes)
    assert read_manifest(folder).capsules.routing_iterations == iterations
    exported, rebuilt = OnnxPredictor(folder), TorchPredictor(read_network(folder))
    images = load_split("test").images[:9].numpy()
    capsules, lengths = exported.encode(images)
    for found, expected in zip(rebuilt.encode(images), (capsules, lengths), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    target = np.arange(9) % 3
    np.testing.assert_allclose(rebuilt.decode(capsules, target), exported.decode(capsules, target), atol=1e-5)


def test_what_an_export_does_not_tell(make: Make) -> None:
    """An exported model that its files do not describe is refused, and its run is read instead."""
    run, folder = make(scaled_votes=True)
    with pytest.raises(ManifestError, match=r"differ by .*name the run's checkpoint"):
        read_network(folder)
    images = torch.randint(0, 256, (2, 13, 12), dtype=torch.uint8)
    expected = TorchPredictor(read_network(run)).encode(images.numpy())[0]
    found = open_trained(folder).predictor.encode(images.numpy())[0]
    np.testing.assert_allclose(found, expected, atol=1e-2)  # its weights were rounded


def test_weights_that_an_export_has_lost(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that the files of an exported model lack is named, and the network refused."""
    _, folder = make()
    start = read_start(folder)
    fewer = {name: value for name, value in start.weights.items() if name != "encoder.conv.bias"}
    monkeypatch.setattr(trained, "read_start", lambda _: replace(start, weights=fewer))
    with pytest.raises(ManifestError, match=r"no PyTorch network fits(.|\n)*encoder\.conv\.bias"):
        read_network(folder)


def test_how_it_was_trained(make: Make) -> None:
    """A run and a model name themselves, and say for how many epochs they were trained on what."""
    run, folder = make()
    opened, exported = open_trained(run), open_trained(folder)
    assert (opened.name, exported.name) == ("a-run", "shapes/3")
    for one in (opened, exported, open_trained(run / "checkpoint.pt")):
        made = one.training
        assert made["architecture"] == "capsnet"
        assert (made["dataset"], made["training_images"]) == ("shapes", 60)
        assert (made["epochs"], made["finished"]) == (2, True)
    assert opened.training["seed"] == 0
    assert (opened.path, exported.path) == (run, folder)
    assert "test_error" in exported.training
    origin = {"source": "shapes/1", "sha256": "", "epochs": 5}
    saved = checkpoints.read(run)
    checkpoints.save(replace(saved, epoch=1, start=origin), run / checkpoints.CHECKPOINT_FILE)
    begun = open_trained(run).training
    assert (begun["epochs"], begun["finished"]) == (6, False), "five of them behind its first weights"
