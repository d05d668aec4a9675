"""Weights to begin training with: those of an earlier run, or of an exported model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from service.manifest import MANIFEST_FILE, Manifest, ManifestError, read_manifest, sha256
from training import checkpoint as checkpoints
from training.config import ModelConfig
from training.graphs import PRIMARY


@dataclass(frozen=True)
class Start:
    """The weights of a network, and where they came from."""

    weights: dict[str, Tensor]
    source: str
    sha256: str
    """Of the file that the encoder's weights were read from."""
    epochs: int
    """Passes over the training images behind these weights, in all."""
    config: ModelConfig
    """Of the network that they are of; of an exported one, as far as its files tell."""
    exported: Path | None = None
    """The folder of the exported model, if they are one's."""

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
        saved.shape(),
    )


def _exported(folder: Path) -> Start:
    manifest = read_manifest(folder)
    weights = {
        **_weights(folder / manifest.encoder.file, "encoder.", ""),
        **_weights(folder / manifest.decoder.file, "layers.", "decoder."),
    }
    try:
        config = _config(manifest, weights)
    except (LookupError, ValueError) as error:
        raise ManifestError(
            f"{folder}: no PyTorch network fits its weights; name the run's checkpoint instead ({error})"
        ) from error
    return Start(
        weights,
        manifest.reference,
        manifest.encoder.sha256,
        manifest.provenance.epochs_in_all,
        config,
        folder,
    )


def _config(manifest: Manifest, weights: dict[str, Tensor]) -> ModelConfig:
    """The settings that the manifest names, and those that are to be seen from the weights."""
    shape: dict[str, Any] = {
        "classes": manifest.classes,
        "height": manifest.image.height,
        "width": manifest.image.width,
        "channels": manifest.image.channels,
        "architecture": manifest.architecture,
        "primary_dimensions": manifest.capsules.primary_dimensions,
        "digit_dimensions": manifest.capsules.digit_dimensions,
        "decoder_units": (len(weights["decoder.layers.0.bias"]), len(weights["decoder.layers.2.bias"])),
    }
    if manifest.architecture == "capsnet":
        matrices, primary = weights["encoder.digit_capsules.weight"], weights[f"{PRIMARY}.bias"]
        channels, _, kernel, _ = weights["encoder.conv.weight"].shape
        shape |= {
            "routing_iterations": manifest.capsules.routing_iterations,
            "conv_channels": channels,
            "kernel_size": kernel,
            "primary_groups": len(primary) // manifest.capsules.primary_dimensions,
            "shared_weights": matrices.shape[1] != manifest.capsules.primary_count,
            "capsule_biases": "encoder.digit_capsules.bias" in weights,
        }
    return ModelConfig(**shape)


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
