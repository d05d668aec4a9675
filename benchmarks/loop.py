"""Where the event loop's time goes: Python's profiler on the service while one caller asks."""

import pstats
import re
import signal
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.served import DIGIT, h2load, require_h2load
from benchmarks.tables import table
from tests.support.process import served

PRECISION = "fp32"

Function = tuple[str, int, str]
"""A file or `~` for what is not Python, a line, a name: as the profiler has it."""


def run(model: Path, seconds: float) -> dict[str, Any]:
    """Calls and microseconds of a /predict with a PNG, by package, the most expensive first.

    One caller's requests find the caches as cold as a batch leaves them, and the cores free: with more, the
    graphs' threads interrupt the loop, and the profiler takes their time for the loop's.

    Raises:
        Missing: h2load is not installed.
    """
    require_h2load()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile"
        program = ("-m", "benchmarks.profiled", str(path))
        settings = {"default_model": model.parent.name, "precision": PRECISION}
        with served(model.parents[1], program=program, **settings) as service:
            h2load(service.port, "/predict", DIGIT, "image/png", 1, 2)  # warm
            service.process.send_signal(signal.SIGUSR1)
            load = h2load(service.port, "/predict", DIGIT, "image/png", 1, seconds, warm_up=0)
            service.process.terminate()
            service.process.wait()
        profile = pstats.Stats(str(path)).stats  # type: ignore[attr-defined] # not in its stub
    requests = load.statuses[200]
    packages = {
        name: {"calls": calls / requests, "microseconds": 1e6 * spent / requests}
        for name, (calls, spent) in by_package(profile).items()
    }
    return {"precision": PRECISION, "packages": packages}


def by_package(profile: dict[Function, Any]) -> dict[str, tuple[int, float]]:
    """Calls and own seconds of each package, and of each file of the service; what takes longest first.

    Functions that are not Python's count with the code that called them. Waiting is left out: it is in the
    function that runs the loop.
    """
    found: dict[str, list[Any]] = defaultdict(lambda: [0, 0.0])

    def add(function: Function, calls: int, own: float) -> None:
        entry = found[package(function[0])]
        entry[0] += calls
        entry[1] += own

    for function, (_, calls, own, _, callers) in profile.items():
        if function[2] == "run" and function[0].endswith("asyncio/runners.py"):
            continue
        if function[0] == "~" and callers:
            for caller, (count, _, part, _) in callers.items():
                add(caller, count, part)
        else:
            add(function, calls, own)
    return {
        name: (calls, spent) for name, (calls, spent) in sorted(found.items(), key=lambda entry: -entry[1][1])
    }


def package(file: str) -> str:
    """The package that a file belongs to; for the service the file itself."""
    for pattern in (r".*/(service/\w+\.py)$", r".*/site-packages/([^/]+)/.*"):
        if found := re.match(pattern, file):
            return found[1]
    return "Python"


def markdown(part: dict[str, Any]) -> str:
    packages = part["packages"]
    calls, spent = (sum(row[name] for row in packages.values()) for name in ("calls", "microseconds"))
    rows = [
        [name, f"{row['calls']:.0f}", f"{row['microseconds']:.0f}", f"{row['microseconds'] / spent:.0%}"]
        for name, row in packages.items()
        if row["microseconds"] >= 0.01 * spent
    ]
    return "\n".join(
        [
            f"## Where the event loop's time goes ({part['precision']}, {part['machine']})",
            "",
            "Python's profiler while one caller sends a PNG to /predict: calls and microseconds of a "
            f"request, {calls:.0f} and {spent:.0f} in all. The profiler itself adds to each call, so the "
            "shares count; what the loop takes without it is in the line on processor time above.",
            "",
            table(["package", "calls", "µs", "share"], rows),
        ]
    )
