"""Weights to begin training with: those of an earlier run, or of an exported model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from service.manifest import MANIFEST_FILE, read_manifest, sha256
from training import checkpoint as checkpoints
from training.config import in_words


@dataclass(frozen=True)
class Start:
    """The weights of a network, and where they came from."""

    weights: dict[str, Tensor]
    source: str
    sha256: str
    """Of the file that the encoder's weights were read from."""
    epochs: int
    """Passes over the training images behind these weights, in all."""
    network: str
    """What they are the weights of, in words."""

    def origin(self) -> dict[str, Any]:
        """Where the weights came from, as a checkpoint keeps it."""
        return {"source": self.source, "sha256": self.sha256, "epochs": self.epochs}


def read_start(path: Path) -> Start:
    """Read the weights in a run's folder, a checkpoint.pt, or an exported model's folder.

    Raises:
        CheckpointError, ManifestError: if what is there is missing, damaged or of another format.
    """
    if (path / MANIFEST_FILE).is_file():
        return _exported(path)
    file = path / checkpoints.CHECKPOINT_FILE if path.is_dir() else path
    saved = checkpoints.read(file)
    return Start(
        saved.model,
        f"a run on {saved.dataset}",
        sha256(file),
        saved.epochs_in_all,
        str(saved.shape()),
    )


def _exported(folder: Path) -> Start:
    manifest = read_manifest(folder)
    weights = {
        **_weights(folder / manifest.encoder.file, "encoder.", ""),
        **_weights(folder / manifest.decoder.file, "layers.", "decoder."),
    }
    image = manifest.image
    return Start(
        weights,
        manifest.reference,
        manifest.encoder.sha256,
        manifest.provenance.epochs_in_all,
        in_words(manifest.architecture, (image.height, image.width, image.channels), len(manifest.classes)),
    )


def _weights(graph: Path, belongs: str, prefix: str) -> dict[str, Tensor]:
    """The initializers of an exported graph whose names begin with `belongs`, as single precision.

    The exporter keeps PyTorch's names, and adds `.half` to weights that are stored in half precision.
    """
    return {
        prefix + tensor.name.removesuffix(".half"): torch.from_numpy(
            numpy_helper.to_array(tensor).astype(np.float32)
        )
        for tensor in onnx.load(graph).graph.initializer
        if tensor.name.startswith(belongs)
    }
