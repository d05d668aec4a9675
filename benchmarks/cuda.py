"""CUDA, checked and measured as the service runs it.

The provider of every node, the answers beside the CPU's, images per second by batch size, the device's
memory before and after every shape, and what its kernels take.
"""

import json
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from benchmarks.tables import table
from benchmarks.timing import take_turns
from service.binding import BoundSession, fetched
from service.engine import Graphs, Way, bring_together, warm_up_sizes, way_of
from service.manifest import Graph, Manifest, Precision, UsedDevice, read_manifest
from service.sessions import Session, buckets, cuda_options, open_session, warm_up
from service.settings import Settings

Options = Mapping[str, str]


class Form(NamedTuple):
    """An encoder as it is opened on CUDA."""

    precision: Precision
    tolerance: float
    """How far a capsule's number or its length may be from fp32 on the CPU; a drawing may be `GREY` away."""
    graphs: bool = False
    """As the service is told by `CAPSNET_CUDA_GRAPHS`."""
    changes: Options = MappingProxyType({})
    """Options of the provider that are not the service's."""

    def options(self, precision: Precision) -> dict[str, str]:
        """Of the provider, for a graph in `precision`."""
        return {**cuda_options(Settings(cuda_graphs=self.graphs), precision), **self.changes}


FORMS = {
    "fp32": Form("fp32", 1e-4),
    "fp32, CUDA graphs": Form("fp32", 1e-4, graphs=True),
    "fp32, NHWC, fused bias": Form("fp32", 1e-4, changes={"prefer_nhwc": "1", "fuse_conv_bias": "1"}),
    "fp16": Form("fp16", 2e-3),
    "fp16, CUDA graphs": Form("fp16", 2e-3, graphs=True),
    "fp16, NCHW, bias apart": Form("fp16", 2e-3, changes={"prefer_nhwc": "0", "fuse_conv_bias": "0"}),
}
GREY = 2 / 255
"""Two levels of a drawing."""
OFFLINE = (256, 1024, 2048, 4096, 8192)
"""Batches for the encoder alone, beyond what the service gathers. Each has sessions of its own, as in the
service: see docs/decisions/0050."""
PROFILED_RUNS = 10


def run(
    model: Path,
    seconds: float,
    max_batch: int = Settings.model_fields["max_batch"].default,
    device: UsedDevice = "cuda",
    threads: int = 1,
    offline: tuple[int, ...] = OFFLINE,
) -> dict[str, Any]:
    """Every form of `FORMS` that the model has.

    Args:
        seconds: for each batch size.
        device: `cpu` takes the same path without a GPU, to try it out.
        offline: batch sizes for the encoder alone.

    Raises:
        DeviceError: CUDA is not in use.
    """
    manifest = read_manifest(model)
    images = sevens(max_batch, manifest.image.shape)
    drawn = np.ones(max_batch, np.bool_)
    expected = _open(model, manifest, FORMS["fp32"], max_batch, "cpu", threads, "plain").predict(
        (images, drawn)
    )
    forms: dict[str, Any] = {}
    opened: dict[str, Graphs] = {}
    for name, form in FORMS.items():
        if form.precision not in manifest.encoders("cuda"):
            continue
        memory = {"before": _used_mib()}
        way = way_of("cuda", Settings(cuda_graphs=form.graphs))
        graphs = _open(model, manifest, form, max_batch, device, threads, way)
        warm_up(graphs.encoder, manifest.encoder, warm_up_sizes(graphs.encoder, max_batch))
        if graphs.drawer is not None:
            warm_up(graphs.drawer, manifest.decoder, warm_up_sizes(graphs.drawer, max_batch))
        memory["warmed up"] = _used_mib()
        differences = [_differences(graphs, images[:rows], expected) for rows in range(1, max_batch + 1)]
        *numbers, drawing = np.max(differences, axis=0).tolist()  # of all sizes; Python's max would lose NaN
        memory["after every size"] = _used_mib()
        opened[name] = graphs
        forms[name] = {
            "difference": float(np.max(numbers)),
            "drawing": drawing,
            "tolerance": form.tolerance,
            "memory_mib": memory,
            "nodes": _nodes(model, manifest, form, device, images[:1]),
            "memory_stays": memory["after every size"] == memory["warmed up"],
        }
    speeds = []
    for rows in buckets(max_batch):
        tasks: dict[str, Callable[[], object]] = {
            name: partial(graphs.predict, (images[:rows], drawn[:rows])) for name, graphs in opened.items()
        }
        speeds.append(_speeds(rows, tasks, seconds))
    opened.clear()
    return {
        "device": _smi("name") or device,
        "driver": _smi("driver_version"),
        "forms": forms,
        "rows": speeds,
        **_alone(model, manifest, offline, seconds, device, threads),
    }


def _alone(
    model: Path,
    manifest: Manifest,
    batches: tuple[int, ...],
    seconds: float,
    device: UsedDevice,
    threads: int,
) -> dict[str, Any]:
    """The encoder's graph: images a second, bytes in, capsules and lengths out, and its kernels."""
    images = sevens(max(batches), manifest.image.shape)
    rows = []
    kernels: dict[str, dict[str, float]] = {}
    for batch in batches:
        encoders: dict[str, BoundSession] = {}
        for name, form in FORMS.items():
            if form.precision in manifest.encoders("cuda"):
                graph = manifest.encoders("cuda")[form.precision]
                session = _session(model, graph, form, form.precision, device, threads)
                encoders[name] = BoundSession(session, graph, [batch])
        tasks = {name: partial(_encode, encoder, images[:batch]) for name, encoder in encoders.items()}
        rows.append(_speeds(batch, tasks, seconds))
        kernels = {name: _kernels(encoder, images[:batch]) for name, encoder in encoders.items()}
    return {"offline": rows, "profiled_batch": batches[-1], "kernels": kernels}


def _speeds(batch: int, tasks: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Images a second of tasks that take a batch each."""
    medians = take_turns(tasks, seconds)
    return {"batch": batch, "images_per_second": {name: batch / median for name, median in medians.items()}}


def _encode(encoder: BoundSession, images: NDArray[np.uint8]) -> None:
    capsules, lengths, *_ = encoder.run(images)
    fetched(capsules), fetched(lengths)


def _kernels(encoder: BoundSession, images: NDArray[np.uint8]) -> dict[str, float]:
    """Microseconds that the device spends on a batch, by kernel and copy; nothing without CUDA."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED_RUNS):
            _encode(encoder, images)
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        spent[event.key] += event.self_device_time_total / PROFILED_RUNS
    return {name: time for name, time in sorted(spent.items(), key=lambda item: -item[1]) if time > 0}


def failures(part: Mapping[str, Any]) -> list[str]:
    """What a run found wrong, a sentence each."""
    found = []
    for name, form in part["forms"].items():
        if not form["difference"] <= form["tolerance"]:
            found.append(
                f"{name} differs from fp32 on the CPU by {form['difference']:.2g}, "
                f"expected at most {form['tolerance']:g}"
            )
        if not form["drawing"] <= GREY:
            found.append(f"{name} draws up to {255 * form['drawing']:.1f} levels apart from fp32 on the CPU")
        on_cpu = form["nodes"].get("CPUExecutionProvider", 0)
        if on_cpu and len(form["nodes"]) > 1:
            found.append(f"{name} runs {on_cpu} nodes of the encoder on the CPU")
        if not form["memory_stays"]:
            found.append(f"{name} took more memory after the warm-up: {form['memory_mib']} MiB")
    return found


def markdown(part: Mapping[str, Any]) -> str:
    forms = part["forms"]

    def speeds(rows: list[Any]) -> str:
        cells = [
            [row["batch"], *(f"{row['images_per_second'][name]:,.0f}" for name in forms)] for row in rows
        ]
        return table(["batch", *forms], cells)

    checks = [
        [
            name,
            ", ".join(f"{count} {provider}" for provider, count in form["nodes"].items()),
            f"{form['difference']:.1e}",
            f"{form['tolerance']:g}",
            f"{255 * form['drawing']:.2f}",
            *form["memory_mib"].values(),
        ]
        for name, form in forms.items()
    ]
    memory = list(next(iter(forms.values()))["memory_mib"])
    return "\n".join(
        [
            f"## CUDA ({part['device']}, driver {part['driver']})",
            "",
            "The encoder's graph, which in fp16 draws as well: bytes in, capsules and lengths out, through "
            "bound buffers; images per second.",
            "",
            speeds(part["offline"]),
            "",
            "Predictions with reconstruction as the service makes them, images per second by batch size.",
            "",
            speeds(part["rows"]),
            "",
            "Where the nodes of the encoder's graph ran; the largest difference of capsules and lengths from "
            "fp32 on the CPU over every batch size up to the largest, and of drawings in grey levels; and "
            "the device's memory in MiB.",
            "",
            table(["form", "nodes", "difference", "allowed", "drawings", *memory], checks),
            *_slowest(part),
        ]
    )


def _slowest(part: Mapping[str, Any]) -> list[str]:
    """The twelve kernels that take the longest, of each form that is served unless told otherwise."""
    lines = []
    for name, kernels in part["kernels"].items():
        if not kernels or FORMS[name].graphs or FORMS[name].changes:
            continue
        whole = sum(kernels.values())
        rows = [
            [f"`{kernel[:90]}`", f"{1000 * time / part['profiled_batch']:.0f}", f"{time / whole:.0%}"]
            for kernel, time in list(kernels.items())[:12]
        ]
        lines += [
            "",
            f"### {name}: {1000 * whole / part['profiled_batch']:.0f} ns of the device for an image, "
            f"in batches of {part['profiled_batch']}",
            "",
            table(["kernel or copy", "ns an image", "share"], rows),
        ]
    return lines


def sevens(count: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The example's digit, moved and dimmed, (count, *shape); noise for a model of another image size."""
    seven = np.asarray(Image.open("docs/examples/seven.png").convert("L"))
    if seven.shape != shape:
        return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    moved = [np.roll(seven, (i % 5 - 2, i // 5 % 5 - 2), (0, 1)) // (1 + i // 25 % 3) for i in range(count)]
    return np.stack(moved)


def _open(
    model: Path,
    manifest: Manifest,
    form: Form,
    max_batch: int,
    device: UsedDevice,
    threads: int,
    way: Way,
) -> Graphs:
    """As the engine opens it, with the form's options of the provider."""

    graph = manifest.encoders("cuda")[form.precision]
    encoder = _session(model, graph, form, form.precision, device, threads)
    decoder = _session(model, manifest.decoder, form, "fp32", device, threads)
    return bring_together(manifest, form.precision, graph, encoder, decoder, (max_batch, max_batch), way)


def _session(
    model: Path, graph: Graph, form: Form, precision: Precision, device: UsedDevice, threads: int
) -> Session:
    """A graph in `precision`, which of the decoder is another than the form's."""
    options = form.options(precision)
    return open_session(model / graph.file, graph, device=device, threads=threads, cuda=options)


def _nodes(
    model: Path,
    manifest: Manifest,
    form: Form,
    device: UsedDevice,
    image: NDArray[np.uint8],
) -> dict[str, int]:
    """How many of the encoder's nodes each provider ran, by ONNX Runtime's profiler."""
    cuda = {**form.options(form.precision), "enable_cuda_graph": "0"}
    providers = ["CPUExecutionProvider"] if device == "cpu" else [("CUDAExecutionProvider", cuda)]
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        encoder = manifest.encoders("cuda")[form.precision]
        session = ort.InferenceSession(model / encoder.file, options, providers=providers)
        session.run(None, {encoder.inputs[0].name: image})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return dict(Counter(event["args"]["provider"] for event in events if "provider" in event.get("args", {})))


def _differences(
    graphs: Graphs, images: NDArray[np.uint8], expected: tuple[NDArray[Any], ...]
) -> tuple[float, float, float]:
    """The largest of capsules, of lengths and of reconstructions."""
    found = graphs.predict((images, np.ones(len(images), np.bool_)))
    capsules, lengths, drawings = (
        float(np.abs(found[output] - expected[output][: len(images)]).max()) for output in (0, 1, 3)
    )
    return capsules, lengths, drawings


def _used_mib() -> int | None:
    used = _smi("memory.used")
    return int(used) if used else None


def _smi(field: str) -> str | None:
    """What nvidia-smi says of the first GPU; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
