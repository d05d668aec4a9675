import json
from collections.abc import Callable
from pathlib import Path

import pytest

from training.data import DIGITS
from training.experiments import ROWS
from training.results import TABLE, ResultsError, document

ROOT = Path(__file__).parents[3]
Add = Callable[..., Path]


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Write the record of a made-up run; with `errors`, by data set, it is finished."""

    def add(name: str, seed: int, *, epoch: int, epochs: int, **errors: float) -> Path:
        row = ROWS[name]
        frame = (40, 40, 1) if name == "affnist" else (28, 28, 1)
        record = {
            "row": name,
            "seed": seed,
            "epoch": epoch,
            "epochs": epochs,
            "tests": {dataset.replace("_", "-"): {"error": error} for dataset, error in errors.items()},
            "seconds": 600.0 * (seed + 1),
            "machine": "2 CPU threads",
            "precision": "fp32",
            "code_revision": "0123456789ab",
            "model_config": row.model_config(DIGITS, frame).as_dict(),
            "train_config": row.train_config(
                epochs=epochs, seed=seed, device="cpu", precision="fp32"
            ).as_dict(),
        }
        path = tmp_path / f"{name}-seed{seed}.json"
        path.write_text(json.dumps(record))
        return path

    return add


def cells(text: str, name: str) -> list[list[str]]:
    """The table's lines of one row, cut into cells."""
    lines = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_committed_table() -> None:
    """The table in the documentation is what the committed records make; `make results` writes it."""
    assert (ROOT / TABLE).read_text(encoding="utf-8") == document(ROOT / TABLE.parent / "runs")


def test_nothing_run(tmp_path: Path) -> None:
    """Without records every row says so, beside what was published."""
    text = document(tmp_path)
    assert text.count("| not run | 0 |") == len(ROWS) + 2, "for affNIST, two are tested on two data sets"
    assert cells(text, "routing-3-reconstruction") == [
        [
            "`routing-3-reconstruction`",
            "CapsNet, 3 iterations, reconstruction",
            "mnist",
            "0.25 ± 0.005, table 1",
            "not run",
            "0",
            "100",
            "–",
        ]
    ]


def test_mean_and_deviation(add: Add, tmp_path: Path) -> None:
    """Finished runs are averaged, with the deviation of a sample; what runs still is no part of it."""
    for seed, error in enumerate((0.25, 0.28, 0.31)):
        add("routing-3", seed, epoch=100, epochs=100, mnist=error)
    add("routing-3", 3, epoch=31, epochs=100)
    (row,) = cells(document(tmp_path), "routing-3")
    assert row[4:] == ["0.280 ± 0.030; seed 3: epoch 31 of 100", "3", "100", "20, 2 CPU threads in fp32"]


def test_one_run(add: Add, tmp_path: Path) -> None:
    """One run has no deviation, and each data set that it was tested on a line."""
    add("affnist", 0, epoch=100, epochs=100, translated_mnist=0.8, affnist=19.25)
    assert [(row[2], row[4], row[5]) for row in cells(document(tmp_path), "affnist")] == [
        ("translated-mnist", "0.80", "1"),
        ("affnist", "19.25", "1"),
    ]


def test_unfinished(add: Add, tmp_path: Path) -> None:
    """A run that has no result says at which epoch it stands."""
    add("multimnist", 0, epoch=31, epochs=100)
    path = tmp_path / "multimnist-seed0.json"
    record = json.loads(path.read_text())
    record["model_config"] |= {"height": 36, "width": 36}
    path.write_text(json.dumps(record))
    (row,) = cells(document(tmp_path), "multimnist")
    assert row[4:6] == ["seed 0: epoch 31 of 100", "0"]


def test_other_length(add: Add, tmp_path: Path) -> None:
    """Runs of fewer epochs than the row's are not averaged with those of all."""
    add("routing-1", 0, epoch=100, epochs=100, mnist=0.3)
    add("routing-1", 1, epoch=20, epochs=20, mnist=0.5)
    assert [row[4:7] for row in cells(document(tmp_path), "routing-1")] == [
        ["0.30", "1", "100"],
        ["0.50", "1", "20"],
    ]


def test_a_short_run_stands_for_no_whole_one(add: Add, tmp_path: Path) -> None:
    """Where only shorter runs were made, the row's own length is still said to be not run."""
    add("routing-1", 1, epoch=20, epochs=20, mnist=0.5)
    assert [row[4:7] for row in cells(document(tmp_path), "routing-1")] == [
        ["not run", "0", "100"],
        ["0.50", "1", "20"],
    ]


def test_uncommitted_code(add: Add, tmp_path: Path) -> None:
    """The table tells which runs were made by code that is in no commit."""
    path = add("routing-1", 0, epoch=100, epochs=100, mnist=0.3)
    path.write_text(path.read_text().replace("0123456789ab", "0123456789ab-dirty"))
    (row,) = cells(document(tmp_path), "routing-1")
    assert row[-1] == "10, 2 CPU threads in fp32, uncommitted"


@pytest.mark.parametrize(
    ("part", "change"),
    [("train_config", {"learning_rate": 0.5}), ("model_config", {"routing_iterations": 2})],
)
def test_other_settings(add: Add, tmp_path: Path, part: str, change: dict[str, float]) -> None:
    """A record of settings that are not its row's is refused, so that a row means one thing."""
    path = add("routing-1", 0, epoch=100, epochs=100, mnist=0.3)
    record = json.loads(path.read_text())
    record[part] |= change
    path.write_text(json.dumps(record))
    with pytest.raises(ResultsError, match="settings of routing-1"):
        document(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"row": "of another time"}', "not json"])
def test_no_record(tmp_path: Path, text: str) -> None:
    """A file that is no record is named."""
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ResultsError, match=r"odd\.json: not a record"):
        document(tmp_path)
