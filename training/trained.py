"""A trained network by its path, whether it is a run of training or an exported model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.manifest import MANIFEST_FILE, ManifestError
from training import checkpoint as checkpoints
from training.model import CapsNet
from training.networks import Network, build
from training.predictor import REBUILT_TOLERANCE, OnnxPredictor, Predictor, TorchPredictor, difference
from training.start import read_start
from training.train import resolve_device


@dataclass(frozen=True)
class Trained:
    """A network to be asked, and how it came about."""

    name: str
    """`<name>/<version>` of an exported model; of a run, its folder's name."""
    predictor: Predictor
    training: dict[str, Any]
    """How it was trained, for a record: plain values, no paths."""
    path: Path
    """As it was given."""


def open_trained(path: Path, device: str = "cpu") -> Trained:
    """Open a run's folder, a checkpoint.pt, or an exported model's folder; the last runs on the CPU alone.

    Raises:
        CheckpointError, ManifestError: if what is there is missing, damaged or of another format.
    """
    if (path / MANIFEST_FILE).is_file():
        exported = OnnxPredictor(path)
        manifest, made = exported.manifest, exported.manifest.provenance
        return Trained(
            manifest.reference,
            exported,
            {
                "architecture": manifest.architecture,
                "dataset": made.dataset,
                "training_images": made.training_images,
                "epochs": made.epochs_in_all,
                "finished": True,
                "test_error": manifest.measured.test_error,
            },
            path,
        )
    saved = checkpoints.read(path)
    run = path if path.is_dir() else path.parent
    return Trained(
        run.resolve().name,
        TorchPredictor(saved.network().to(resolve_device(device))),
        {
            "architecture": saved.shape().architecture,
            "dataset": saved.dataset,
            "training_images": saved.training_images,
            "epochs": saved.epochs_in_all,
            "finished": saved.finished,
            "augmentation": saved.settings().augmentation,
            "reconstruction_weight": saved.settings().reconstruction_weight,
            "seed": saved.settings().seed,
        },
        path,
    )


def read_network(path: Path) -> Network:
    """The PyTorch network of a run or of an exported model, in evaluation mode on the CPU.

    Raises:
        CheckpointError, ManifestError: as `open_trained` and `read_exported`.
    """
    return read_exported(path) if (path / MANIFEST_FILE).is_file() else checkpoints.read(path).network()


def read_exported(folder: Path) -> CapsNet:
    """The PyTorch network of an exported model, in evaluation mode on the CPU.

    Raises:
        ManifestError: if the folder is no complete model, or its files do not hold all that the network
            needs, such as votes that were scaled.
    """
    exported = OnnxPredictor(folder)
    start = read_start(folder)
    try:
        network = build(start.config)
        network.load_state_dict(start.weights)
    except RuntimeError as error:
        raise ManifestError(
            f"{folder}: no PyTorch network fits its weights; name the run's checkpoint instead ({error})"
        ) from error
    if not isinstance(network, CapsNet):
        raise ManifestError(
            f"{folder}: a model of architecture {exported.manifest.architecture} has no capsules"
        )
    _require_alike(folder, exported, TorchPredictor(network.eval()))
    return network


def _require_alike(folder: Path, exported: Predictor, rebuilt: Predictor) -> None:
    """Raise `ManifestError` if they see other capsules: not every switch shows in the weights."""
    apart = difference(exported, rebuilt)
    if not apart <= REBUILT_TOLERANCE:
        raise ManifestError(
            f"{folder}: its graph and the network of its weights differ by {apart:.2g}, expected at most "
            f"{REBUILT_TOLERANCE}: it was trained with a switch that the files do not tell; name the run's "
            "checkpoint instead"
        )
