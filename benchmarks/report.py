"""`docs/results/benchmarks.{json,md,png}` from what was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import cuda, loop, served, workers
from benchmarks.frameworks import comparison
from benchmarks.offline import PLAIN
from benchmarks.tables import table
from benchmarks.through_openvino import ABSENT
from benchmarks.timing import CONVOLUTIONS


def write(measured: dict[str, Any], folder: Path) -> None:
    """Replace the parts in `measured`; those of earlier runs that are not in it stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmarks.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known |= measured
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    (folder / "benchmarks.md").write_text(markdown(known), encoding="utf-8")
    if "offline" in known:
        plot(known["offline"], folder / "benchmarks.png")
    if "served" in known:
        served.plot(known["served"], folder / "served.png")


def markdown(measured: dict[str, Any]) -> str:
    parts: dict[str, Callable[[dict[str, Any]], str]] = {
        "offline": _offline,
        "profile": _profile,
        "training": _training,
        "served": served.markdown,
        "frameworks": comparison.markdown,
        "frameworks-int8": comparison.markdown,
        "loop": loop.markdown,
        "cuda": cuda.markdown,
        "cuda-served": workers.markdown,
        "cuda-training": _training,
    }
    texts = [make(measured[name]) for name, make in parts.items() if name in measured]
    return (
        "\n\n".join(
            [
                "# Benchmarks",
                "Written by `make bench`. Medians; everything in a table took turns in one run.",
                *texts,
            ]
        )
        + "\n"
    )


def _offline(part: dict[str, Any]) -> str:
    names = list(part["rows"][0]["images_per_second"])
    rows = []
    for row in part["rows"]:
        speeds = row["images_per_second"]
        cells = [f"{speeds[name]:.0f} ({speeds[name] / speeds[PLAIN]:.2f}x)" for name in names]
        rows.append([row["batch"], *cells, f"{row['sgemm_gflops']:.0f}"])
    best = {name: max(row["images_per_second"][name] for row in part["rows"]) for name in names}
    ratios = ", ".join(
        f"{name} {best[name] / best[PLAIN]:.2f}x" for name in names if name not in (PLAIN, CONVOLUTIONS)
    )
    return "\n".join(
        [
            f"## Offline inference ({part['threads']} threads, {part['machine']})",
            "",
            "Raw `session.run` of the encoder, images per second; beside each, its ratio to the plain export "
            "of the same weights. The ceilings are the two convolutions alone (PyTorch, fp32) and the "
            "product of two large matrices, which also tells how much of the machine a row had: where it is "
            "low, others were at work.",
            "",
            table(["batch", *names, "sgemm, GFLOP/s"], rows),
            "",
            f"Each at its best batch size, over the plain export at its: {ratios}. "
            f"OpenVINO: {part.get('openvino', ABSENT)}.",
        ]
    )


def _profile(part: dict[str, Any]) -> str:
    lines = [
        f"## Where the time goes (batch {part['batch']}, one thread, {part['machine']})",
        "",
        "ONNX Runtime's profiler: microseconds for each image, the least of each node's runs, by operator.",
    ]
    for name, kinds in part["microseconds"].items():
        whole = sum(kinds.values())
        rows = [
            [kind, f"{least / part['batch']:.0f}", f"{least / whole:.0%}"]
            for kind, least in kinds.items()
            if least >= 0.01 * whole
        ]
        lines += ["", f"### {name}", "", table(["operator", "µs an image", "share"], rows)]
    return "\n".join(lines)


def _training(part: dict[str, Any]) -> str:
    speeds = part["images_per_second"]
    rows = []
    for arithmetic, peak in part["peak_mib"].items():
        step, alone = speeds[f"step, {arithmetic}"], speeds[f"{CONVOLUTIONS}, {arithmetic}"]
        rows.append([arithmetic, f"{step:.0f}", f"{alone:.0f}", f"{step / alone:.2f}", f"{peak:.0f}"])
    return "\n".join(
        [
            f"## A training step (batch {part['batch']}, {_where(part)})",
            "",
            "Shifts, network, losses, gradients and Adam, beside forward and backward of the two "
            "convolutions alone.",
            "",
            table(
                ["arithmetic", "step, images/s", "convolutions alone, images/s", "ratio", "peak memory, MiB"],
                rows,
            ),
        ]
    )


def _where(part: dict[str, Any]) -> str:
    """The processor that trained, or the GPU."""
    device = part.get("device", "cpu")
    return f"{part['threads']} threads, {part['machine']}" if device == "cpu" else str(device)


def plot(part: dict[str, Any], path: Path) -> None:
    """Images per second over the batch size."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    batches = [row["batch"] for row in part["rows"]]
    for name in part["rows"][0]["images_per_second"]:
        style = "--" if name == CONVOLUTIONS else "-"
        axes.plot(
            batches, [row["images_per_second"][name] for row in part["rows"]], style, marker="o", label=name
        )
    axes.set(xscale="log", xlabel="batch size", ylabel="images per second", ylim=(0, None))
    axes.set_xticks(batches, [str(batch) for batch in batches])
    figure.legend(loc="outside upper center", ncols=3)  # or it would hide a curve
    figure.savefig(path, dpi=110)
