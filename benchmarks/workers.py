"""The service over HTTP on one GPU, by the number of its worker processes and of its callers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.served import DIGIT, h2load, require_h2load
from benchmarks.tables import table
from service.cpus import cpu_limit
from service.manifest import UsedDevice
from tests.support.process import served

CALLERS = (1, 32, 128, 512)


def run(
    model: Path,
    seconds: float,
    rounds: int,
    workers: Sequence[int] | None = None,
    callers: Sequence[int] = CALLERS,
    device: UsedDevice = "cuda",
) -> dict[str, Any]:
    """Answers a second and their times, each the median of `rounds` loads.

    Args:
        model: a folder `<models>/<name>/<version>`.
        seconds: of each load.
        workers: numbers of them; from one to as many as there are processors unless given.

    Raises:
        Missing: h2load is not installed.
    """
    require_h2load()
    processors = cpu_limit()
    rows = []
    for count in workers or [n for n in (1, 4, 8, 12, 16, 32, 64) if n < processors] + [processors]:
        settings = {"device": device, "workers": str(count), "default_model": model.parent.name}
        with served(model.parents[1], **settings) as service:
            ready = service.client.get("/readyz").json()["models"]
            for number in callers:
                loads = [
                    h2load(service.port, "/predict", DIGIT, "image/png", number, seconds)
                    for _ in range(rounds)
                ]
                rows.append(
                    {
                        "workers": count,
                        "callers": number,
                        "rate": statistics.median(load.rate for load in loads),
                        "p50": statistics.median(load.percentile(0.5) for load in loads),
                        "p99": statistics.median(load.percentile(0.99) for load in loads),
                        "refused": statistics.median(
                            load.statuses.get(503, 0) / load.seconds for load in loads
                        ),
                    }
                )
                print("  " + ", ".join(f"{name} {value:.5g}" for name, value in rows[-1].items()))
    default = next(entry for entry in ready if entry["name"] == model.parent.name)
    return {
        "processors": processors,
        "device": default["device"],
        "precision": default["precision"],
        "seconds": seconds,
        "rounds": rounds,
        "rows": rows,
    }


def markdown(part: dict[str, Any]) -> str:
    rows = [
        [
            row["workers"],
            row["callers"],
            f"{row['rate']:,.0f}",
            f"{row['p50']:.1f}",
            f"{row['p99']:.1f}",
            f"{row['refused']:.0f}",
        ]
        for row in part["rows"]
    ]
    return "\n".join(
        [
            f"## Served from a GPU, by workers ({part['processors']} processors, {part['machine']})",
            "",
            f"PNG to /predict in {part['precision']} on {part['device']}, loaded by h2load on the same "
            f"processors; medians of {part['rounds']} loads of {part['seconds']:g} s.",
            "",
            table(["workers", "callers", "images/s", "p50, ms", "p99, ms", "refused/s"], rows),
        ]
    )
