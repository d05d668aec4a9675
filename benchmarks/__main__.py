"""`python -m benchmarks [parts …]`: measure, and write tables and plots into docs/results."""

import argparse
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cuda, loop, offline, report, served, training_step, workers
from benchmarks.frameworks import comparison
from benchmarks.frameworks.processes import FrameworkError
from service.cpus import cpu_limit
from service.errors import DeviceError
from service.manifest import Precision
from training.train import TrainingError

PARTS = ("offline", "profile", "training", "served", "loop")
ASKED_FOR = ("frameworks", "frameworks-int8", "cuda", "cuda-served", "cuda-training")
"""Parts that only run when they are named: the first two install gigabytes, the others need a GPU."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="part",
        help=f"what to measure: {', '.join(PARTS)} (all of these), {', '.join(ASKED_FOR)}",
    )
    parser.add_argument("--model", type=Path, help="model folder whose weights to take (the newest mnist)")
    parser.add_argument("--seconds", type=float, default=8, help="for each table row (%(default)s)")
    parser.add_argument("--threads", type=int, default=cpu_limit(), help="CPU threads (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of the parts served, cuda-served and frameworks (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args(arguments)
    # As an exception, so that whatever serves meanwhile is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if unknown := set(options.parts) - {*PARTS, *ASKED_FOR}:
        parser.error(f"unknown parts {sorted(unknown)}, expected some of {[*PARTS, *ASKED_FOR]}")
    model = options.model or newest(Path("models/mnist"))
    # Bytes of no meaning do: no operator's time depends on the values.
    images = np.random.default_rng(0).integers(0, 256, (max(offline.BATCHES), 28, 28), np.uint8)
    wrong: list[str] = []
    for part in options.parts or PARTS:
        print(f"measuring: {part}")
        try:
            measured = _measure(part, model, images, options)
        except (FrameworkError, DeviceError, TrainingError, served.Missing) as error:
            parser.exit(1, f"{part} was not measured: {error}\n")
        if part == "cuda":
            wrong = cuda.failures(measured)
        report.write({part: {"machine": _machine(), **measured}}, options.output)
    print((options.output / "benchmarks.md").read_text(encoding="utf-8"))
    if wrong:
        parser.exit(1, "\n".join(wrong) + "\n")


def _measure(part: str, model: Path, images: served.Images, options: argparse.Namespace) -> dict[str, Any]:
    def compared(precision: Precision) -> dict[str, Any]:
        return comparison.run(model, precision, options.seconds, options.threads, options.rounds)

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "offline": lambda: offline.run(model, images, options.seconds, options.threads),
        "profile": lambda: offline.profile(model, images, batch=8),
        "training": lambda: training_step.run(options.seconds, options.threads),
        "served": lambda: served.run(model, images, options.seconds, options.threads, options.rounds),
        "loop": lambda: loop.run(model, options.seconds),
        "frameworks": lambda: compared("fp32"),
        "frameworks-int8": lambda: compared("int8"),
        "cuda": lambda: cuda.run(model, options.seconds),
        "cuda-served": lambda: workers.run(model, options.seconds, options.rounds),
        "cuda-training": lambda: training_step.run(options.seconds, options.threads, device_name="cuda"),
    }
    return parts[part]()


def newest(models: Path) -> Path:
    """The folder of the highest version."""
    return max(models.glob("[1-9]*"), key=lambda path: int(path.name))


def _machine() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
