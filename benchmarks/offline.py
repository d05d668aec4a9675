"""Raw `session.run` of the encoder in all its forms, by batch size, beside what bounds it."""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch.nn import functional as F

from benchmarks import through_openvino
from benchmarks.plain import write_plain_encoder
from benchmarks.timing import CONVOLUTIONS, take_turns
from training.export import RANGE_IMAGES, round_to_half, write_encoder
from training.graphs import encoder_graph, largest_feature
from training.model import CapsNet
from training.trained import read_exported
from training.winograd import WinogradGraph

BATCHES = (1, 8, 32, 128, 256)
PLAIN = "plain einsum"
"""What each form is compared with."""
DIRECT = "fp32, direct"
"""The form that is for GPUs, and for other runtimes."""
GEMM = 2048
"""Side of the matrices whose product gives the peak."""


def run(model: Path, images: np.ndarray[Any, Any], seconds: float, threads: int) -> dict[str, Any]:
    """Images per second of each graph at each batch size.

    Args:
        images: (M, H, W) bytes, as many as the largest batch.
        seconds: for each batch size.
    """
    torch.set_num_threads(threads)
    network = read_exported(model)
    round_to_half(network)
    with tempfile.TemporaryDirectory() as folder:
        return _measure(network, images, Path(folder), seconds, threads)


def _measure(
    network: CapsNet, images: np.ndarray[Any, Any], folder: Path, seconds: float, threads: int
) -> dict[str, Any]:
    paths = write_graphs(network, images, folder)
    sessions = {name: open_session(path, threads) for name, path in paths.items()}
    openvino = through_openvino.version()
    if openvino != through_openvino.ABSENT:
        pairs = write_pairs(network, images, folder)
    rows = []
    for batch in [size for size in BATCHES if size <= len(images)]:
        first = np.ascontiguousarray(images[:batch])
        tasks: dict[str, Callable[[], object]] = {
            name: partial(session.run, None, {"images": first}) for name, session in sessions.items()
        }
        if openvino != through_openvino.ABSENT:
            tasks |= {
                f"OpenVINO {name}": through_openvino.compiled(path, first, threads)
                for name, path in (("fp32", paths[DIRECT]), ("int8", pairs))
            }
        tasks[CONVOLUTIONS] = _convolutions(network, first)
        tasks["sgemm"] = _sgemm()
        medians = take_turns(tasks, seconds)
        flop = 2 * GEMM**3 / medians.pop("sgemm")
        rows.append(
            {
                "batch": batch,
                "images_per_second": {name: batch / median for name, median in medians.items()},
                "sgemm_gflops": flop / 1e9,
            }
        )
    return {"threads": threads, "openvino": openvino, "rows": rows}


def write_graphs(network: CapsNet, images: np.ndarray[Any, Any], folder: Path) -> dict[str, Path]:
    """The encoder in every form, in `folder`; the first is what the others are compared with."""
    names = {PLAIN: "plain", DIRECT: "encoder", "fp32": "encoder.winograd", "int8": "encoder.int8"}
    paths = {name: folder / f"{stem}.onnx" for name, stem in names.items()}
    write_plain_encoder(network, paths[PLAIN])
    write_encoder(network, paths[DIRECT])
    onnx.save(encoder_graph(network, writer=WinogradGraph), paths["fp32"])
    onnx.save(encoder_graph(network, _largest(network, images)), paths["int8"])
    return paths


def write_pairs(network: CapsNet, images: np.ndarray[Any, Any], folder: Path) -> Path:
    """The 8-bit encoder as OpenVINO takes it, in `folder`."""
    path = folder / "pairs.onnx"
    onnx.save(encoder_graph(network, _largest(network, images), through_openvino.PairsGraph), path)
    return path


def _largest(network: CapsNet, images: np.ndarray[Any, Any]) -> float:
    """Speed does not depend on the range, so any images will do for it."""
    return largest_feature(network, torch.from_numpy(images[:RANGE_IMAGES]))


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as the service has it
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _convolutions(network: CapsNet, images: np.ndarray[Any, Any]) -> Callable[[], object]:
    x = torch.from_numpy(images).unsqueeze(1).float()

    @torch.inference_mode()
    def both() -> object:
        return network.encoder.primary_capsules.conv(F.relu(network.encoder.conv(x)))

    return both


def _sgemm() -> Callable[[], object]:
    a = torch.ones(GEMM, GEMM)
    return lambda: a @ a


def profile(model: Path, images: np.ndarray[Any, Any], batch: int, runs: int = 30) -> dict[str, Any]:
    """Least microseconds of each operator type of each form, one thread, from ONNX Runtime's profiler.

    The least of several runs of a node is the one that nothing interrupted.
    """
    network = read_exported(model)
    round_to_half(network)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_graphs(network, images, Path(folder)).items():
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for _ in range(runs):
                session.run(None, {"images": np.ascontiguousarray(images[:batch])})
            events = json.loads(Path(session.end_profiling()).read_text())
            found[name] = by_operator(events)
    return {"batch": batch, "microseconds": found}


def by_operator(events: list[dict[str, Any]]) -> dict[str, float]:
    """Each node's least time, summed by operator type, the slowest type first."""
    nodes: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"]
            nodes[key] = min(nodes.get(key, float("inf")), event["dur"])
    sums: dict[str, float] = {}
    for (kind, _), least in nodes.items():
        sums[kind] = sums.get(kind, 0) + least
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
