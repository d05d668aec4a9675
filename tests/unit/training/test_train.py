import io
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.interruption import interrupted_at
from training import checkpoint as checkpoints
from training import train as training
from training.checkpoint import CheckpointError
from training.config import ModelConfig, TrainConfig
from training.data import Dataset, Split, shift
from training.evaluate import Evaluation, evaluate
from training.losses import margin_loss
from training.model import CapsNet
from training.predictor import TorchPredictor
from training.train import TrainingError, resolve_device, train

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

    with interrupted_at(6, monkeypatch):  # in its second epoch, of four steps
        run(config, tmp_path / "parts")
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


def test_code_that_went_on_with_a_run(
    run: Run, train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's records name every revision of the code that trained it, once."""
    for revision, interruption in (
        ("first", interrupted_at(6, monkeypatch)),  # in its second epoch, of four steps
        ("first", interrupted_at(6, monkeypatch)),
        ("second-dirty", nullcontext()),
        ("third", nullcontext()),  # with nothing left to do
    ):
        monkeypatch.setattr(training, "code_revision", lambda revision=revision: revision)
        with interruption:
            run(train_config, tmp_path, resume=True)
    assert checkpoints.read(tmp_path).code_revision == "first, second-dirty"
    assert json.loads((tmp_path / "result.json").read_text())["code_revision"] == "first, second-dirty"


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


def test_resume_with_other_images(
    run: Run, model_config: ModelConfig, train_config: TrainConfig, load_split: Load, tmp_path: Path
) -> None:
    """A run goes on with the files that it began with, or not at all."""
    config = replace(train_config, epochs=1)
    run(config, tmp_path)
    others = replace(load_split("train"), checksums={"train": "other shapes"})
    with pytest.raises(CheckpointError, match="trained with train = 'train shapes', but 'other shapes' was"):
        train(others, model_config, config, tmp_path, load_test=lambda: load_split("test"), resume=True)


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


def test_progress_in_a_log(
    model_config: ModelConfig,
    train_config: TrainConfig,
    load_split: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without a terminal each epoch's line is written when the epoch ends, and no bar beside them."""
    log = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(log))
    lines: list[int] = []
    train(
        load_split("train"),
        model_config,
        train_config,
        tmp_path,
        load_test=lambda: load_split("test"),
        after_epoch=lambda _: lines.append(log.getvalue().count(b"\n")),
    )
    assert lines == [2, 3, 4], "what is trained on, and the epochs"
    assert "\r" not in capfd.readouterr().err


def test_a_run_that_ends_while_its_rate_rises(
    run: Run, train_config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of fewer steps than the rate takes to rise says so when it begins."""
    run(replace(train_config, epochs=1, warm_up_steps=4), tmp_path / "enough")
    assert "rises" not in capsys.readouterr().out
    run(replace(train_config, epochs=1, warm_up_steps=5), tmp_path / "few")
    assert "note: the learning rate rises over 5 steps, and this run has 4\n" in capsys.readouterr().out


def test_without_validation(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """With nothing held out, the network learns from every training image."""
    state = run(replace(train_config, epochs=1, validation_images=0), tmp_path)
    assert state.training_images == 66
    assert "validation_error" not in state.history[0]


@pytest.mark.parametrize(("held_out", "looks"), [(6, [6, 66]), (0, [66])])
def test_errors_are_of_the_network_as_it_will_be_used(
    run: Run,
    train_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held_out: int,
    looks: list[int],
) -> None:
    """Held-out and test images are looked at without dropout and without the statistics of a batch."""
    seen: list[int] = []

    def look(predictor: TorchPredictor, dataset: Dataset) -> Evaluation:
        assert not predictor.network.training
        seen.append(len(dataset))
        return evaluate(predictor, dataset)

    monkeypatch.setattr(training, "evaluate", look)
    run(replace(train_config, epochs=1, validation_images=held_out), tmp_path)
    assert seen == looks


@pytest.mark.parametrize("step", [0, 3, 11])
def test_loss_that_is_no_number(
    run: Run, train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A loss that is no longer a number, at whatever step, ends the run and reaches no checkpoint."""
    steps = iter(range(100))

    def poisoned(lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return margin_loss(lengths, target) * (torch.nan if next(steps) == step else 1)

    monkeypatch.setattr(training, "margin_loss", poisoned)
    with pytest.raises(TrainingError, match=r"are nan by step .* smaller --learning-rate"):
        run(train_config, tmp_path)
    if step < 4:  # four steps an epoch
        assert not (tmp_path / "checkpoint.pt").exists()
    else:
        saved = checkpoints.read(tmp_path)
        assert saved.epoch == step // 4
        assert all(weight.isfinite().all() for weight in saved.model.values())


def test_weights_that_are_no_numbers(
    run: Run, train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights spoilt by the epoch's very last step, whose loss was still a number, reach no checkpoint."""
    adam_step = torch.optim.Adam.step
    steps = iter(range(100))

    def spoil(optimizer: torch.optim.Adam) -> None:
        adam_step(optimizer)
        if next(steps) == 3:
            optimizer.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    with pytest.raises(TrainingError, match="the loss or the weights are nan by step 3"):
        run(train_config, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_what_a_step_does(
    run: Run,
    load_split: Load,
    train_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arithmetic: str,
) -> None:
    """Shifted images go in with their labels as targets, at the scheduled rate and precision."""
    originals = load_split("train")
    rates: list[float] = []
    moved = 0
    forward, adam_step = CapsNet.forward, torch.optim.Adam.step

    def spy(
        network: CapsNet, images: torch.Tensor, target: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal moved
        assert target is not None
        for image, label in zip(images, target, strict=True):
            stored = originals.images[originals.labels == label]
            ways = [
                shift(stored, torch.full((len(stored),), y), torch.full((len(stored),), x))
                .eq(image)
                .flatten(1)
                .all(dim=1)
                .any()
                for y in (-1, 0, 1)
                for x in (-1, 0, 1)
            ]
            assert any(ways), "an image of its class, moved by one pixel at most"
            moved += not ways[4]
        dtypes = []
        hook = network.encoder.conv.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
        found = forward(network, images, target)
        hook.remove()
        assert dtypes == [torch.bfloat16 if arithmetic == "bf16" else torch.float32]
        return found

    def note_rate(optimizer: torch.optim.Adam) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        adam_step(optimizer)

    monkeypatch.setattr(CapsNet, "forward", spy)
    monkeypatch.setattr(torch.optim.Adam, "step", note_rate)
    config = replace(train_config, precision=arithmetic)  # type: ignore[arg-type] # one of the two
    run(config, tmp_path)
    assert moved > 60
    assert rates == [config.learning_rate_at(step, 12) for step in range(12)]


def test_reconstruction_weight(
    run: Run, train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is the margin loss plus the weighted reconstruction loss: without weight, nothing is drawn; a
    run's history has the mean of each over the images, and the share of mistakes in per cent."""
    config = replace(train_config, epochs=1)
    without = run(replace(config, reconstruction_weight=0), tmp_path / "without").model
    torch.manual_seed(config.seed)
    fresh = CapsNet(ModelConfig.from_dict(checkpoints.read(tmp_path / "without").model_config)).state_dict()
    assert all(torch.equal(without[name], fresh[name]) for name in fresh if name.startswith("decoder"))
    totals = []
    backward = torch.Tensor.backward

    def note(loss: torch.Tensor) -> None:
        totals.append(loss.item())
        backward(loss)  # type: ignore[no-untyped-call] # a function kept in a variable escapes the exception

    monkeypatch.setattr(torch.Tensor, "backward", note)
    monkeypatch.setattr(training, "margin_loss", lambda lengths, _: 0 * lengths.sum(dim=-1) + 3)
    monkeypatch.setattr(training, "reconstruction_loss", lambda drawn, _: 0 * drawn[:, 0, 0] + 2000)
    monkeypatch.setattr(training, "mistaken", lambda _, labels: labels >= 0)
    (row,) = run(replace(config, reconstruction_weight=0.0005), tmp_path / "with").history
    assert totals == pytest.approx([4.0] * 4)
    assert (row["margin_loss"], row["reconstruction_loss"]) == pytest.approx((3, 2000))
    assert row["training_error"] == 100


def test_result_of_another_run(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """A result whose run is gone is not mistaken for that of a new one."""
    config = replace(train_config, epochs=1)
    run(config, tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(TrainingError, match=r"result\.json is of another run"):
        run(config, tmp_path, resume=True)


def test_layout(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """The convolutions' weights lie channels last; the transformation matrices stay as they are read."""
    weights = run(replace(train_config, epochs=1), tmp_path).model
    assert weights["encoder.primary_capsules.conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert weights["encoder.digit_capsules.weight"].is_contiguous()


def test_log(run: Run, train_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's log of a run that was interrupted and resumed holds each of its steps once, each figure
    under its own name."""
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    monkeypatch.setattr(training, "reconstruction_loss", lambda drawn, _: 0 * drawn[:, 0, 0] + 2000)
    with interrupted_at(6, monkeypatch):  # in its second epoch, of four steps
        run(train_config, tmp_path)
    run(train_config, tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("error/validation")] == [3, 7, 11]
    assert [event.step for event in events.Scalars("loss/margin")] == list(range(12))
    margin, total, drawn, rates = (
        [event.value for event in events.Scalars(name)]
        for name in ("loss/margin", "loss/total", "loss/reconstruction", "learning_rate")
    )
    assert drawn == [2000] * 12
    assert total == pytest.approx([loss + 1 for loss in margin])
    assert rates == pytest.approx([train_config.learning_rate_at(step, 12) for step in range(12)])


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for CUDA where there is none fails; `auto` takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"device cuda was asked for, but .* sees no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(TrainingError, match="device is 'tpu', expected auto, cpu or cuda"):
        resolve_device("tpu")
    assert resolve_device("auto") == torch.device("cpu")


def test_auto_is_settled_at_the_start(run: Run, train_config: TrainConfig, tmp_path: Path) -> None:
    """What `auto` came to is stored, so that no later machine can change it."""
    state = run(replace(train_config, epochs=1, device="auto"), tmp_path)
    assert state.train_config["device"] == resolve_device("auto").type
    assert state.train_config["precision"] in ("fp32", "bf16")


def test_how_a_step_is_made_is_not_restored() -> None:
    """A run of older code resumes with its moments, and with this code's rate and kind of step."""
    weight = torch.nn.Parameter(torch.ones(2))
    old = torch.optim.Adam([weight], lr=0.5)
    weight.sum().backward()
    old.step()
    rate = torch.tensor(0.1)
    new = torch.optim.Adam([weight], lr=rate, capturable=True)
    training._restore(new, old.state_dict())
    (group,) = new.param_groups
    assert group["lr"] is rate
    assert group["capturable"]
    torch.testing.assert_close(new.state[weight]["exp_avg"], old.state[weight]["exp_avg"])
