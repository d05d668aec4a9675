"""One way to ask a network, whether it is a PyTorch module or exported graphs: NumPy in, NumPy out."""

from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from service.manifest import Manifest, read_manifest
from training.baseline import BaselineCNN
from training.model import length
from training.networks import Network

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class Predictor(Protocol):
    """Encode once, decode many times."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W) or (H, W, 3)."""
        ...

    @property
    def draws(self) -> bool:
        """Whether it can decode: a network without capsules cannot."""
        ...

    def encode(self, images: Images) -> tuple[Floats, Floats]:
        """Images (B, H, W[, 3]) -> digit capsules (B, K, D) and capsule lengths (B, K).

        Of a network without capsules, the probabilities of the classes, as capsules of one dimension.
        """
        ...

    def decode(self, capsules: Floats, target: Labels) -> Floats:
        """Digit capsules (B, K, D) and the classes to draw (B,) -> reconstructions (B, H, W[, 3])."""
        ...


class TorchPredictor:
    """A network in PyTorch, in full precision, on the device it lies on."""

    def __init__(self, network: Network) -> None:
        self.network = network

    @property
    def classes(self) -> tuple[str, ...]:
        return self.network.config.classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.network.config.image_shape

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def draws(self) -> bool:
        return not isinstance(self.network, BaselineCNN)

    @torch.inference_mode()
    def encode(self, images: Images) -> tuple[Floats, Floats]:
        if isinstance(self.network, BaselineCNN):
            probabilities = self.network.probabilities(torch.from_numpy(images).to(self.device)).cpu()
            return probabilities.unsqueeze(-1).numpy(), probabilities.numpy()
        capsules = self.network.encoder(torch.from_numpy(images).to(self.device))
        return capsules.cpu().numpy(), length(capsules).cpu().numpy()

    @torch.inference_mode()
    def decode(self, capsules: Floats, target: Labels) -> Floats:
        if isinstance(self.network, BaselineCNN):
            raise ValueError("a baseline CNN has no capsules to draw from; see `draws`")
        reconstructions: torch.Tensor = self.network.decoder(
            torch.from_numpy(capsules).to(self.device), torch.from_numpy(target).to(self.device)
        )
        return reconstructions.cpu().numpy()


REBUILT_TOLERANCE = 1e-3
"""Largest difference of a capsule's dimension between an exported encoder and the network made of it."""


def difference(one: Predictor, other: Predictor) -> float:
    """Largest difference of a capsule's dimension on four images: not every setting shows in the weights."""
    images = np.random.default_rng(0).integers(0, 256, (4, *one.image_shape), np.uint8)
    images[1::2] //= 4  # darker ones too
    return float(np.abs(one.encode(images)[0] - other.encode(images)[0]).max())


def open_graph(path: Path) -> ort.InferenceSession:
    """A graph, to be run by ONNX Runtime on the CPU."""
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_encoder(session: ort.InferenceSession, images: Images) -> tuple[Floats, Floats]:
    """Images (B, H, W[, 3]) -> digit capsules (B, K, D) and capsule lengths (B, K)."""
    capsules, lengths = session.run(["digit_capsules", "capsule_lengths"], {"images": images})
    return capsules, lengths


class OnnxPredictor:
    """An exported model folder, run by ONNX Runtime on the CPU.

    Raises:
        ManifestError: if the folder is not a complete, unaltered model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._encoder = open_graph(folder / self.manifest.encoder.file)
        self._decoder = open_graph(folder / self.manifest.decoder.file)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.manifest.image.shape

    @property
    def draws(self) -> bool:
        return True

    def encode(self, images: Images) -> tuple[Floats, Floats]:
        return run_encoder(self._encoder, images)

    def decode(self, capsules: Floats, target: Labels) -> Floats:
        (reconstructions,) = self._decoder.run(
            ["reconstructions"], {"digit_capsules": capsules, "target": target}
        )
        return reconstructions  # type: ignore[no-any-return] # ONNX Runtime is published without types
