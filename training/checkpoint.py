"""A training run on disk, written so that a reader finds a whole checkpoint or none."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from training.config import ModelConfig, TrainConfig
from training.networks import Network, build

CHECKPOINT_FILE = "checkpoint.pt"
FORMAT = 1

# What PyTorch and zipfile raise for files that are no checkpoints.
UNREADABLE = (OSError, RuntimeError, LookupError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file and the reason."""


@dataclass
class Checkpoint:
    """All that is needed to go on training as if nothing had happened, and to export the result."""

    model_config: dict[str, Any]
    train_config: dict[str, Any]
    dataset: str
    dataset_checksums: dict[str, str]
    training_images: int
    code_revision: str
    """Of the code that began the run, and after commas of what else went on with it."""
    epoch: int
    """Epochs completed."""
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    generators: dict[str, torch.Tensor]
    """States of the random generators, by what they draw."""
    history: list[dict[str, float]]
    """One row for each completed epoch."""
    start: dict[str, Any] | None = None
    """Where the first weights came from (`Start.origin`); none if they were random."""
    format: int = FORMAT

    def network(self) -> Network:
        """The network with this checkpoint's weights, in evaluation mode on the CPU."""
        try:
            network = build(ModelConfig.from_dict(self.model_config))
            network.load_state_dict(self.model)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint of other code than this: {error}") from error
        return network.eval()

    def settings(self) -> TrainConfig:
        """The settings of the run."""
        try:
            return TrainConfig.from_dict(self.train_config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint of other code than this: {error}") from error

    def shape(self) -> ModelConfig:
        """The network's shape."""
        try:
            return ModelConfig.from_dict(self.model_config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint of other code than this: {error}") from error

    @property
    def epochs_in_all(self) -> int:
        """Epochs completed, those behind the first weights included."""
        return self.epoch + (self.start["epochs"] if self.start else 0)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings().epochs


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Replace `path` in one step: an interruption leaves the old checkpoint or the new one.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save({field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # After a failed write PyTorch still ends its archive, fails at that, and so hides the first fault.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); free some space, or mend what else is wrong there, and "
            "go on with --resume"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint, or the one in a run's folder.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another format.
    """
    if path.is_dir():
        path = path / CHECKPOINT_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; `capsnet train` writes one after each epoch")
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch does not look at the checksums in its own files
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: damaged, the checksum of {damaged} does not match")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(f"{path}: checkpoint format {found}, this code reads format {FORMAT}")
    try:
        return Checkpoint(**values)
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def require_same(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to resume a run under other settings than it began with."""
    for name, value in asked.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{path}: was trained with {name} = {saved.get(name)!r}, but {value!r} was asked for; "
                "resume with the same settings or choose another --output"
            )
