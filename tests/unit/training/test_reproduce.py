import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.interruption import interrupted_at
from training import checkpoint as checkpoints
from training import data, reproduce
from training.cli import main
from training.data import DIGITS, Dataset, Split
from training.experiments import ROWS, Row
from training.reproduce import Size
from training.train import TrainingError

SMALL = {"conv_channels": 8, "primary_groups": 2, "decoder_units": (8, 8)}


def small(row: Row) -> Row:
    """The row, with a network that trains in a moment; Efficient-CapsNet knows no other size."""
    return replace(row, model={**row.model, **SMALL})


@pytest.fixture(autouse=True)
def few_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten bright squares instead of MNIST, and an empty folder to work in."""

    def load(name: str, split: Split, data_dir: Path | None = None) -> Dataset:
        images = torch.zeros(40, 28, 28, dtype=torch.uint8)
        labels = torch.arange(40) % 10
        for image, label in zip(images, labels.tolist(), strict=True):
            image[6 + label : 14 + label, 8:20] = 200
        return Dataset(name, DIGITS, images, labels, {split: split})

    monkeypatch.setattr(data, "load", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(reproduce.SIZES, "smoke", Size(images=20, training={"epochs": 2}))


@pytest.mark.parametrize("name", ROWS)
def test_smoke(name: str) -> None:
    """Every row's smoke size trains, tests on all data sets of the row, and leaves the results alone."""
    path = reproduce.reproduce(name, small(ROWS[name]), "smoke", seed=3, device="cpu")
    assert path == Path(f"runs/reproduce/{name}-smoke-epochs2-seed3/record.json")
    assert not Path("docs").exists()
    record = json.loads(path.read_text())
    assert (record["row"], record["seed"], record["epoch"], record["epochs"]) == (name, 3, 2, 2)
    assert list(record["tests"]) == list(ROWS[name].published)
    for test in record["tests"].values():
        assert test["images"] == (100 if name.startswith("multimnist") else 20)
        assert test["error"] == pytest.approx(100 * test["mistakes"] / test["images"])
    assert len(record["history"]) == 2
    assert record["seconds"] == pytest.approx(sum(row["seconds"] for row in record["history"]))
    assert (record["precision"], record["train_config"]["device"]) == ("fp32", "cpu")
    assert record["model_config"]["architecture"] == ROWS[name].model.get("architecture", "capsnet")


def test_smoke_begins_anew() -> None:
    """A smoke run of the same name is no obstacle to the next one."""
    row = small(ROWS["routing-1"])
    for _ in range(2):
        path = reproduce.reproduce("routing-1", row, "smoke", device="cpu")
        assert len(json.loads(path.read_text())["history"]) == 2


def test_a_small_run_is_kept_out_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small run takes the first images alone, is resumable, and leaves the results alone."""
    monkeypatch.setitem(reproduce.SIZES, "small", replace(reproduce.SIZES["small"], images=30))
    row = small(ROWS["routing-1"])
    record = json.loads(reproduce.reproduce("routing-1", row, "small", device="cpu").read_text())
    assert (record["training_images"], record["epochs"]) == (30, 3)
    assert not Path("docs").exists()
    with pytest.raises(TrainingError, match="add --resume"):
        reproduce.reproduce("routing-1", row, "small", device="cpu")


def test_full_run_is_recorded_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted full run stands in the results with its epoch, and ends as if it had not been."""
    row = small(ROWS["affnist"])
    options: dict[str, Any] = {"device": "cpu", "epochs": 2}
    with interrupted_at(2, monkeypatch):  # in its second epoch, of one step
        reproduce.reproduce("affnist", row, "full", **options)
    path = Path("docs/results/runs/affnist-epochs2-seed0.json")
    begun = json.loads(path.read_text())
    assert (begun["epoch"], begun["epochs"], begun["tests"]) == (1, 2, {})

    with pytest.raises(TrainingError, match="add --resume"):
        reproduce.reproduce("affnist", row, "full", **options)
    assert reproduce.reproduce("affnist", row, "full", resume=True, **options) == path
    ended = json.loads(path.read_text())
    assert (ended["epoch"], len(ended["history"])) == (2, 2)
    assert list(ended["tests"]) == ["translated-mnist", "affnist"]
    assert ended["training_images"] == 40, "a full run takes all images"
    saved = checkpoints.read(Path("runs/reproduce/affnist-full-epochs2-seed0"))
    assert ended["history"] == saved.history

    # What was interrupted between the last epoch and the tests is tested then, and not trained again.
    path.unlink()
    reproduce.reproduce("affnist", row, "full", resume=True, **options)
    assert json.loads(path.read_text()) == ended


def test_of_several_processes_one_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is not the first of those that train together leaves the tests to that one."""
    monkeypatch.setenv("RANK", "1")
    path = reproduce.reproduce("routing-1", small(ROWS["routing-1"]), "smoke", device="cpu")
    assert json.loads(path.read_text())["tests"] == {}


def test_runs_of_other_lengths_keep_apart() -> None:
    """A run of one length leaves the record and the checkpoint of another as they are."""
    row = small(ROWS["routing-1"])
    one, two = (reproduce.reproduce("routing-1", row, "full", device="cpu", epochs=n) for n in (1, 2))
    assert [json.loads(path.read_text())["epoch"] for path in (one, two)] == [1, 2]
    assert len(list(Path("runs/reproduce").iterdir())) == 2


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`capsnet reproduce` runs a row by its name, and `capsnet results` puts its record into the table."""
    monkeypatch.setitem(ROWS, "routing-1", small(ROWS["routing-1"]))
    assert main(["reproduce", "routing-1", "--epochs", "1", "--seed", "4", "--device", "cpu"]) == 0
    assert "recorded in docs/results/runs/routing-1-epochs1-seed4.json" in capsys.readouterr().out
    assert main(["results"]) == 0
    lines = [t for t in Path("docs/results/table1.md").read_text().splitlines() if "`routing-1`" in t]
    assert "| 0 | 100 |" in lines[0], "no run of the row's length"
    assert "| 1 | 1 |" in lines[1], "one run, of one epoch"


def test_help_lists_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Which results there are is to be found out from the command."""
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    out = capsys.readouterr().out
    assert all(name in out and row.what in out for name, row in ROWS.items())
