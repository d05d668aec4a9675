import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training import checkpoint as checkpoints
from training import train as training
from training.checkpoint import CheckpointError
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split
from training.losses import margin_loss
from training.model import CapsNet
from training.predictor import TorchPredictor
from training.train import TrainingError, convolutions_in, learning_rate, resolve_device, train

Load = Callable[[Split], Dataset]


@pytest.fixture
def run(model_config: ModelConfig, load_split: Load) -> Callable[..., checkpoints.Checkpoint]:
    def run(config: TrainConfig, output: Path, *, resume: bool = False) -> checkpoints.Checkpoint:
        return train(
            load_split("train"),
            model_config,
            config,
            output,
            load_test=lambda: load_split("test"),
            resume=resume,
        )

    return run


Run = Callable[..., checkpoints.Checkpoint]


def test_it_learns(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """A small network learns to tell bars, poles and dots apart, and says so in its result file."""
    state = run(replace(train_config, epochs=15), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test_images"] == 66
    assert result["test_error"] < 5
    assert state.history[-1]["reconstruction_loss"] < 0.9 * state.history[0]["reconstruction_loss"]
    assert state.history[-1]["validation_error"] == 0
    assert state.training_images == 60


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_resume_is_exact(
    run: Run, train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arithmetic: str
) -> None:
    """A run interrupted in its second epoch and resumed ends with the weights of an uninterrupted one."""
    config = replace(train_config, precision=arithmetic)  # type: ignore[arg-type] # one of the two
    whole = run(config, tmp_path / "whole")

    calls = 0

    def interrupted(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:  # four steps an epoch
            raise KeyboardInterrupt
        return margin_loss(*arguments)

    monkeypatch.setattr(training, "margin_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "parts")
    monkeypatch.setattr(training, "margin_loss", margin_loss)
    assert checkpoints.read(tmp_path / "parts").epoch == 1
    torch.manual_seed(999)  # whatever state the new process is in
    parts = run(config, tmp_path / "parts", resume=True)

    assert parts.epoch == whole.epoch == 3
    for name, weight in whole.model.items():
        assert torch.equal(weight, parts.model[name]), name
    for name, generator in whole.generators.items():
        assert torch.equal(generator, parts.generators[name]), name
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in s.history] for s in (whole, parts)
    ]
    assert timeless[0] == timeless[1]


def test_seed(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """The same seed gives the same weights; another seed gives others."""
    config = replace(train_config, epochs=1)
    first, same = run(config, tmp_path / "1").model, run(config, tmp_path / "2").model
    other = run(replace(config, seed=1), tmp_path / "3").model
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    assert not any(torch.equal(weight, other[name]) for name, weight in first.items())


def test_resuming_a_finished_run_changes_nothing(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """Resuming a finished run trains no further."""
    finished = run(train_config, tmp_path)
    again = run(train_config, tmp_path, resume=True)
    assert all(torch.equal(weight, again.model[name]) for name, weight in finished.model.items())


def test_resume_from_nothing(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """With nothing to resume from, a run begins: one command serves to start and to go on."""
    assert run(replace(train_config, epochs=1), tmp_path, resume=True).epoch == 1


def test_existing_run(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """A run is never overwritten by another."""
    run(replace(train_config, epochs=1), tmp_path)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt exists; add --resume"):
        run(train_config, tmp_path)


def test_resume_with_other_settings(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """A run goes on as it began or not at all."""
    run(replace(train_config, epochs=1), tmp_path)
    with pytest.raises(CheckpointError, match="was trained with batch_size = 16, but 8 was asked for"):
        run(replace(train_config, epochs=1, batch_size=8), tmp_path, resume=True)


def test_the_test_set_is_touched_once(
    model_config: ModelConfig, train_config: TrainConfig, load_split: Load, tmp_path: Path
) -> None:
    """The test images are loaded once, after the last epoch's checkpoint is written."""
    epochs_when_loaded = []

    def load_test() -> Dataset:
        epochs_when_loaded.append(checkpoints.read(tmp_path).epoch)
        return load_split("test")

    for _ in range(2):
        train(load_split("train"), model_config, train_config, tmp_path, load_test=load_test, resume=True)
    assert epochs_when_loaded == [3]


def test_without_validation(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """With nothing held out, the network learns from every training image."""
    state = run(replace(train_config, epochs=1, validation_images=0), tmp_path)
    assert state.training_images == 66
    assert "validation_error" not in state.history[0]


def test_loss_that_is_no_number(
    run: Run, train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is no longer a number ends the run with a reason."""
    monkeypatch.setattr(training, "margin_loss", lambda lengths, _: lengths.sum(dim=-1) * torch.nan)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0 .* smaller --learning-rate"):
        run(train_config, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_learning_rate_decays_exponentially() -> None:
    """The rate runs from the first to the final one, by the same factor at each step."""
    config = TrainConfig(learning_rate=1e-2, final_learning_rate=1e-4)
    rates = [learning_rate(config, step, 5) for step in range(5)]
    assert rates == pytest.approx([1e-2, 10**-2.5, 1e-3, 10**-3.5, 1e-4])
    assert learning_rate(config, 0, 1) == 1e-2


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for CUDA where there is none fails; `auto` takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"device cuda was asked for, but .* sees no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(TrainingError, match="device is 'tpu', expected auto, cpu or cuda"):
        resolve_device("tpu")
    assert resolve_device("auto") == torch.device("cpu")


def test_mixed_precision_touches_the_convolutions_alone(model_config: ModelConfig) -> None:
    """In bf16 the convolutions give bf16 and everything after them fp32; afterwards all is as before."""
    torch.manual_seed(0)
    network = CapsNet(model_config).eval()
    images = torch.randint(0, 256, (4, 13, 12), dtype=torch.uint8)
    before = TorchPredictor(network).encode(images.numpy())[0]
    kinds = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
        for module in (network.encoder.conv, network.encoder.primary_capsules, network.encoder.digit_capsules)
    ]
    with convolutions_in(network, "bf16"):
        mixed, _ = network(images)
    assert kinds == [torch.bfloat16, torch.float32, torch.float32]
    for hook in hooks:
        hook.remove()
    assert 0 < (mixed - torch.from_numpy(before)).abs().max() < 0.05
    assert torch.equal(
        torch.from_numpy(TorchPredictor(network).encode(images.numpy())[0]), torch.from_numpy(before)
    )
