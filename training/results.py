"""The table of reproduced results, made from the records of runs and nothing else."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.config import ModelConfig, TrainConfig
from training.experiments import ROWS, Row

TABLE = Path("docs/results/table1.md")

HEAD = """\
# The paper's results, reproduced

Made by `make results` from the files in `docs/results/runs`; do not edit. `make reproduce-<row>` makes such
a file, by the settings in [experiments.py](../../training/experiments.py). Test error in per cent after the
last epoch, which is fixed before the run: mean ± standard deviation over the finished runs, which differ by
their seeds. Runs of another length are listed by themselves, below the row's own: they are not its beginning,
as the whole decay of the rate lies within their epochs (but for the authors' schedule). Code that differed
from its commit is "uncommitted". The affNIST-like test set is made from MNIST's test digits and is not
affNIST itself ([decision 8](../decisions/0008-data-sets-made-as-they-are-used.md)).

| row | network | tested on | published | measured | runs | epochs | minutes a run, on |
|---|---|---|---|---|---|---|---|
"""

Record = Mapping[str, Any]


class ResultsError(Exception):
    """A record that does not belong in the table; the message names the file and the reason."""


def document(folder: Path) -> str:
    """The table in Markdown, of the records in `folder`.

    Raises:
        ResultsError: for a record of an unknown row, or of other settings than its row's.
    """
    records = [read(path) for path in sorted(folder.glob("*.json"))]
    lines = []
    for name, row in ROWS.items():
        own = [record for record in records if record["row"] == name]
        for dataset in row.published:
            for epochs in sorted({row.epochs} | {record["epochs"] for record in own}, reverse=True):
                alike = [record for record in own if record["epochs"] == epochs]
                lines.append(_line(name, row, dataset, epochs, alike))
    return HEAD + "\n".join(lines) + "\n"


def read(path: Path) -> Record:
    """One record, which must be of the settings that its row has now."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        row = ROWS[record["row"]]
        model = ModelConfig.from_dict(record["model_config"])
        training = TrainConfig.from_dict(record["train_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path}: not a record of a row of training/experiments.py ({error!r})") from error
    own = {name: getattr(training, name) for name in ("epochs", "seed", "device", "precision")}
    if (
        row.model_config(model.classes, (model.height, model.width, model.channels)),
        row.train_config(**own),
    ) != (
        model,
        training,
    ):
        raise ResultsError(
            f"{path}: the settings of {record['row']} in training/experiments.py are not those of this run; "
            "run it again, or give the changed row a name of its own"
        )
    return record


def _line(name: str, row: Row, dataset: str, epochs: int, records: Sequence[Record]) -> str:
    finished = [record for record in records if record["tests"]]
    begun = [f"seed {r['seed']}: epoch {r['epoch']} of {r['epochs']}" for r in records if not r["tests"]]
    measured = _mean([record["tests"][dataset]["error"] for record in finished])
    minutes = f"{statistics.mean(record['seconds'] for record in finished) / 60:.0f}, " if finished else ""
    machines = " and ".join(sorted({f"{record['machine']} in {record['precision']}" for record in records}))
    changed = any("-dirty" in record["code_revision"] for record in records)
    cells = [
        f"`{name}`",
        row.what,
        dataset,
        row.published[dataset] or "–",
        "; ".join([*measured, *begun]) or "not run",
        str(len(finished)),
        str(epochs),
        (minutes + machines or "–") + ", uncommitted" * changed,
    ]
    return "| " + " | ".join(cells) + " |"


def _mean(errors: Sequence[float]) -> list[str]:
    """At most one text."""
    if len(errors) > 1:
        return [f"{statistics.mean(errors):.3f} ± {statistics.stdev(errors):.3f}"]
    return [f"{error:.2f}" for error in errors]
