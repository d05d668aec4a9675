"""What each framework serves: base64 PNG -> what our service answers, by the graphs that ours runs.

Runs in the framework's environment, which has NumPy, ONNX Runtime and Pillow and nothing else of ours.
"""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

PORT = int(os.environ.get("BENCH_PORT", "0"))
WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))
"""Processes, or copies, that each run the graphs."""
BATCH = max(1, 32 // WORKERS)
"""Images at most in one run: with more, one worker of several would take all that 32 callers send."""
WAIT_MS = int(os.environ.get("BENCH_WAIT_MS", "0"))
"""How long the first image of a batch may wait for others."""


def decode(png: str | bytes) -> NDArray[np.uint8]:
    """Base64 of a grey PNG -> (H, W)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"))


def opened(variable: str) -> ort.InferenceSession:
    """The graph in the file that the variable names, on BENCH_THREADS threads, as our service opens it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(os.environ[variable], options, providers=["CPUExecutionProvider"])


class Classifier:
    """The graphs in the files BENCH_ENCODER and BENCH_DECODER."""

    def __init__(self) -> None:
        self.encoder = opened("BENCH_ENCODER")
        self.decoder = opened("BENCH_DECODER")

    def results(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Images (H, W) -> (B, K + 1): the capsules' lengths, and the error of what the longest draws."""
        pixels = np.stack(images)
        capsules, lengths = self.encoder.run(["digit_capsules", "capsule_lengths"], {"images": pixels})
        inputs = {"digit_capsules": capsules, "target": lengths.argmax(axis=1)}
        (drawn,) = self.decoder.run(["reconstructions"], inputs)
        missed = (drawn - pixels / np.float32(255)).reshape(len(pixels), -1)
        found: NDArray[np.float32] = np.column_stack([lengths, np.einsum("bp,bp->b", missed, missed)])
        return found

    def __call__(self, pngs: Sequence[str | bytes]) -> list[dict[str, Any]]:
        """The answer for each image."""
        return [answer(row) for row in self.results([decode(png) for png in pngs])]


def answer(result: NDArray[np.float32]) -> dict[str, Any]:
    """(K + 1,) -> what a caller gets: the class, each capsule's length, the error."""
    lengths, error = result[:-1], result[-1]
    return {"class": int(lengths.argmax()), "lengths": lengths.tolist(), "reconstruction_error": float(error)}
