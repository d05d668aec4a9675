"""What each framework serves: base64 PNG -> lengths of the class capsules, by the encoder that ours runs.

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
"""Processes, or copies, that each run the graph."""
BATCH = max(1, 32 // WORKERS)
"""Images at most in one run: with more, one worker of several would take all that 32 callers send."""
WAIT_MS = int(os.environ.get("BENCH_WAIT_MS", "0"))
"""How long the first image of a batch may wait for others."""


def decode(png: str | bytes) -> NDArray[np.uint8]:
    """Base64 of a grey PNG -> (H, W)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"))


class Classifier:
    """The encoder in the file BENCH_ENCODER, on BENCH_THREADS threads, as our service opens it."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(os.environ["BENCH_ENCODER"], options, providers=providers)

    def lengths(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Images (H, W) -> (B, K)."""
        found: NDArray[np.float32] = self.session.run(["capsule_lengths"], {"images": np.stack(images)})[0]
        return found

    def __call__(self, pngs: Sequence[str | bytes]) -> list[dict[str, Any]]:
        """The answer for each image."""
        return [answer(row) for row in self.lengths([decode(png) for png in pngs])]


def answer(lengths: NDArray[np.float32]) -> dict[str, Any]:
    """(K,) -> what a caller gets: the number of the class and the length of each class's capsule."""
    return {"class": int(lengths.argmax()), "lengths": lengths.tolist()}
