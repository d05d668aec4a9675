"""One run of one row: train, test after the last epoch, and keep a record of how far it is."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from training import checkpoint as checkpoints
from training import compose
from training.checkpoint import Checkpoint
from training.data import Dataset, Split
from training.evaluate import evaluate
from training.experiments import Row
from training.predictor import TorchPredictor
from training.train import RESULT_FILE, TrainingError, resolve_device, train, write_json

RUNS = Path("runs/reproduce")
RECORDS = Path("docs/results/runs")
"""Records of full runs, from which `training.results` makes its table."""

SizeName = Literal["smoke", "small", "full"]


@dataclass(frozen=True)
class Size:
    """How much of a row is run."""

    images: int | None = None
    """Of each split's files, the first so many; all if unset."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings instead of the row's."""


# Of the rows, the baseline CNN is the slowest: ten times the work of the paper's network for each image.
# Its batches are small, so that so few images make enough steps to see it learn.
SIZES: dict[SizeName, Size] = {
    "smoke": Size(images=256, training={"epochs": 2, "batch_size": 16}),
    # Enough to learn by, and little enough for the baseline CNN without a GPU: half an hour on two cores.
    "small": Size(images=10_000, training={"epochs": 3, "batch_size": 64}),
    "full": Size(),
}


def reproduce(
    name: str,
    row: Row,
    size: SizeName,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    epochs: int | None = None,
    **settings: Any,
) -> Path:
    """Train and test `row`; return the file of its record, which is written anew after each epoch.

    A full run's record goes among the results, another's beside its checkpoint; runs of different lengths
    have files of their own. All but smoke runs, which begin anew each time, are resumable.

    Args:
        name: the row's, for the names of files.
        epochs: instead of the row's or the size's. The results name runs of another length apart.
        settings: seed, device and precision, as in `TrainConfig`.

    Raises:
        TrainingError, CheckpointError, DataError: as `train` and `compose.load` do.
    """
    images = SIZES[size].images

    def load(dataset: str, split: Split) -> Dataset:
        return compose.load(dataset, split, data_dir, count=images)

    length = {} if epochs is None else {"epochs": epochs}
    config = row.train_config(**{**SIZES[size].training, **settings, **length})
    run = f"epochs{config.epochs}-seed{config.seed}"
    output = RUNS / f"{name}-{size}-{run}"
    record = RECORDS / f"{name}-{run}.json" if size == "full" else output / "record.json"
    if size == "smoke" and not resume:
        shutil.rmtree(output, ignore_errors=True)
    if (output / checkpoints.CHECKPOINT_FILE).exists() and not resume:
        raise TrainingError(f"{output} holds this run; add --resume to go on, or delete it to begin anew")

    def write(state: Checkpoint, tests: dict[str, dict[str, float]]) -> None:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, describe(name, state, tests))

    dataset = load(row.dataset, "train")
    state = train(
        dataset,
        row.model_config(dataset.classes, compose.frame(dataset)),
        config,
        output,
        load_test=lambda: load(row.dataset, "test"),
        resume=resume,
        after_epoch=lambda state: write(state, {}),
    )
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one writes
        write(state, _tests(row, state, output, load))
    return record


def describe(name: str, state: Checkpoint, tests: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The record of a run after `state.epoch` epochs; without `tests` it is not finished."""
    device = resolve_device(state.train_config["device"])
    return {
        "row": name,
        "seed": state.train_config["seed"],
        "epoch": state.epoch,
        "epochs": state.train_config["epochs"],
        "tests": tests,
        "seconds": sum(row["seconds"] for row in state.history),
        "machine": f"{torch.get_num_threads()} CPU threads"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device),
        "precision": state.train_config["precision"],
        "code_revision": state.code_revision,
        "training_images": state.training_images,
        "model_config": state.model_config,
        "train_config": state.train_config,
        "history": state.history,
    }


def _tests(
    row: Row, state: Checkpoint, output: Path, load: Callable[[str, Split], Dataset]
) -> dict[str, dict[str, float]]:
    """Mistakes on each data set of `row`: the trainer has tested on the first of them."""
    result = json.loads((output / RESULT_FILE).read_text(encoding="utf-8"))
    tests = {row.dataset: {key: result[f"test_{key}"] for key in ("images", "mistakes", "error")}}
    for dataset in [name for name in row.published if name != row.dataset]:
        network = state.network().to(resolve_device(state.train_config["device"]))
        found = evaluate(TorchPredictor(network), load(dataset, "test"))
        tests[dataset] = {"images": found.images, "mistakes": found.mistakes, "error": found.error}
        print(f"{dataset}: test error {found.error:.2f} % ({found.mistakes} of {found.images})")
    return tests
