from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.manifest import Start as Recorded
from service.manifest import read_manifest, sha256
from training import checkpoint as checkpoints
from training.checkpoint import Checkpoint, CheckpointError
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split
from training.export import Name, export, round_to_half
from training.model import CapsNet
from training.start import Start, read_start
from training.train import TrainingError, begin, train

Load = Callable[[Split], Dataset]
Run = Callable[..., Checkpoint]
EFFICIENT = Path(__file__).parents[3] / "models" / "mnist-efficient" / "1"


@pytest.fixture
def run(model_config: ModelConfig, train_config: TrainConfig, load_split: Load) -> Run:
    def run(output: Path, start: Start | None = None, *, epochs: int = 1, resume: bool = False) -> Checkpoint:
        return train(
            load_split("train"),
            model_config,
            replace(train_config, epochs=epochs),
            output,
            load_test=lambda: load_split("test"),
            start=start,
            resume=resume,
        )

    return run


def test_from_a_run(run: Run, tmp_path: Path) -> None:
    """The weights of a run are read from its folder or from its checkpoint."""
    state = run(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / checkpoints.CHECKPOINT_FILE):
        start = read_start(path)
        assert start.epochs == 1
        assert start.source == "a run on shapes"
        assert start.sha256 == sha256(tmp_path / "run" / checkpoints.CHECKPOINT_FILE)
        assert start.weights.keys() == state.model.keys()
        assert all(torch.equal(start.weights[name], state.model[name]) for name in state.model)


def test_from_an_exported_model(
    model_config: ModelConfig, train_config: TrainConfig, load_split: Load, tmp_path: Path
) -> None:
    """The weights of an exported model, however small, are all of the run's, as the export rounded them."""
    state = train(
        load_split("train"),
        model_config,
        train_config,
        tmp_path / "run",
        load_test=lambda: load_split("test"),
    )
    place = Name(tmp_path / "models", "shapes", "3")
    manifest = export(state, place, load_split)
    start = read_start(place.folder)
    assert start.origin() == {"source": "shapes/3", "sha256": manifest.encoder.sha256, "epochs": 3}
    network = state.network()
    round_to_half(network)
    expected = network.state_dict()
    assert start.weights.keys() == expected.keys()
    assert all(torch.equal(start.weights[name], expected[name]) for name in expected)


def test_training_begins_with_the_weights(run: Run, tmp_path: Path) -> None:
    """A first epoch from given weights gives just what an epoch from those weights gives, and no other."""
    run(tmp_path / "long", epochs=4)
    start = read_start(tmp_path / "long")
    none = {name: torch.zeros_like(value) for name, value in start.weights.items()}
    begun, again = run(tmp_path / "begun", start), run(tmp_path / "again", start)
    nothing = run(tmp_path / "nothing", replace(start, weights=none))
    name = "encoder.digit_capsules.weight"
    assert torch.equal(begun.model[name], again.model[name])
    assert nothing.model[name].abs().max() == 0  # all-zero weights get no gradient
    assert begun.model[name].abs().max() > 0


def test_epochs_add_up(run: Run, load_split: Load, tmp_path: Path) -> None:
    """Manifest, card and a third run know every epoch behind the weights, and where the first came from."""
    run(tmp_path / "one", epochs=2)
    second = run(tmp_path / "two", read_start(tmp_path / "one"))
    assert second.epochs_in_all == 3
    assert read_start(tmp_path / "two").epochs == 3
    place = Name(tmp_path / "models", "shapes", "1")
    export(second, place, load_split)
    made = read_manifest(place.folder).provenance
    assert made.epochs == 1
    assert made.start == Recorded(
        source="a run on shapes", sha256=read_start(tmp_path / "one").sha256, epochs=2
    )
    assert "those of a run on shapes, after 2 epochs" in (place.folder / "MODEL_CARD.md").read_text()
    assert read_start(place.folder).epochs == 3


def test_a_start_that_lacks_a_weight(run: Run, tmp_path: Path) -> None:
    """Weights that are not all of the network's are refused, and those that lack are named."""
    run(tmp_path / "one")
    start = read_start(tmp_path / "one")
    fewer = {name: value for name, value in start.weights.items() if "digit_capsules" not in name}
    with pytest.raises(TrainingError, match=r"settings must be the same \(.*digit_capsules.* has shape none"):
        run(tmp_path / "two", replace(start, weights=fewer))


def test_resuming_needs_the_same_start(run: Run, tmp_path: Path) -> None:
    """A run that began with given weights is not resumed as one that began with others."""
    run(tmp_path / "one")
    start = read_start(tmp_path / "one")
    run(tmp_path / "two", start)
    with pytest.raises(CheckpointError, match="start = "):
        run(tmp_path / "two", resume=True)
    assert run(tmp_path / "two", start, resume=True).epoch == 1


def test_weights_of_another_network(run: Run, tmp_path: Path) -> None:
    """Weights that do not fit are refused before anything is written."""
    start = Start({"encoder.conv.weight": torch.zeros(1)}, "another/1", "", 1, ModelConfig(("a", "b")))
    with pytest.raises(TrainingError, match="the weights of another/1 are of another network, capsnet for 2"):
        run(tmp_path / "run", start)
    assert not (tmp_path / "run").exists()


def test_both_networks_are_named(run: Run, model_config: ModelConfig, tmp_path: Path) -> None:
    """Weights of other images are refused in a line: what they are of, what is trained, and a difference."""
    taller = replace(model_config, height=15)
    network = CapsNet(taller)
    state = replace(run(tmp_path / "one"), model_config=taller.as_dict(), model=network.state_dict())
    checkpoints.save(state, tmp_path / "taller" / "checkpoint.pt")
    with pytest.raises(TrainingError) as refusal:
        run(tmp_path / "two", read_start(tmp_path / "taller"))
    assert "capsnet for 3 classes of 12x15 images in grey, than the one to train" in str(refusal.value)
    assert "capsnet for 3 classes of 12x13 images in grey: its image size" in str(refusal.value)
    assert str(refusal.value).endswith("(height is 15, expected 13)")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"routing_iterations": 1},
        {"scaled_votes": True},
        {"shared_weights": True},
        {"capsule_biases": True},
        {"decoder_units": (8, 8)},
    ],
    ids=lambda setting: next(iter(setting)),
)
@pytest.mark.parametrize("kind", ["a run", "an exported model"])
def test_a_setting_that_differs_is_named(
    setting: dict[str, Any],
    kind: str,
    run: Run,
    model_config: ModelConfig,
    train_config: TrainConfig,
    load_split: Load,
    tmp_path: Path,
) -> None:
    """Weights of a network that differs in one setting are refused, though all their shapes be the same."""
    other = replace(model_config, **setting)
    state = train(
        load_split("train"), other, train_config, tmp_path / "run", load_test=lambda: load_split("test")
    )
    path = tmp_path / "run"
    if kind == "an exported model":
        place = Name(tmp_path / "models", "shapes", "3")
        export(state, place, load_split)
        path = place.folder
    start, (name,) = read_start(path), setting
    with pytest.raises(TrainingError, match=name):
        begin(model_config, train_config, start, torch.device("cpu"))
    network, _ = begin(replace(other, routing_gradients=True), train_config, start, torch.device("cpu"))
    assert network.training
    renamed = replace(other, classes=tuple(f"{label}s" for label in other.classes))
    begin(renamed, train_config, start, torch.device("cpu"))


def test_one_place_with_shared_weights(train_config: TrainConfig, load_split: Load, tmp_path: Path) -> None:
    """Where each group has one capsule, no file of an exported model tells whether its weights are shared."""

    def load(split: Split) -> Dataset:
        dataset = load_split(split)
        return replace(dataset, images=dataset.images[:, :9, :9].contiguous())

    config = ModelConfig(
        load_split("train").classes,
        9,
        9,
        conv_channels=4,
        kernel_size=5,
        primary_groups=2,
        shared_weights=True,
    )
    assert config.grid == (1, 1)
    state = train(
        load("train"),
        config,
        replace(train_config, epochs=1),
        tmp_path / "run",
        load_test=lambda: load("test"),
    )
    place = Name(tmp_path / "models", "shapes", "3")
    export(state, place, load)
    begin(config, train_config, read_start(place.folder), torch.device("cpu"))


def test_an_exported_network_is_named() -> None:
    """Of an exported model, the manifest tells what the weights are of."""
    start = read_start(EFFICIENT)
    assert str(start.config) == "efficient-capsnet for 10 classes of 28x28 images in grey"


def test_training_begins_with_an_exported_efficient_capsnet() -> None:
    """Its graphs hold no count of normalised batches, and training needs none."""
    start = read_start(EFFICIENT)
    config = ModelConfig(read_manifest(EFFICIENT).classes, architecture="efficient-capsnet")
    network, _ = begin(config, TrainConfig(), start, torch.device("cpu"))
    weights = network.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in start.weights.items())
