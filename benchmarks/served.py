"""The service over HTTP, loaded by h2load, beside raw `session.run` of the graph that it serves."""

import http.client
import io
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from matplotlib.figure import Figure

from benchmarks import least
from benchmarks.offline import open_session
from benchmarks.tables import table
from benchmarks.timing import take_turns
from service.manifest import Manifest, Precision, read_manifest
from tests.support.process import Served, served

CONCURRENCIES = (1, 8, 32, 64, 512)
LEAST_CONCURRENCIES = (1, 8, 32, 64)
"""Loads of the least service, which refuses nobody."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
RAW_BATCHES = (1, 8, 16, 32, 64)
BULK = 1024
"""Images of one npy request."""
STARTS = 5
DIGIT = Path(__file__).parents[1] / "docs" / "examples" / "seven.png"
"""What single requests send: an image that the service takes as it is."""

Images = np.ndarray[Any, Any]


class Missing(Exception):
    """A program that a benchmark needs; the message says which and where it comes from."""


@dataclass(frozen=True)
class Load:
    """What h2load saw of one load: answers by status, and the milliseconds of those that were 200."""

    seconds: float
    statuses: dict[int, int]
    milliseconds: list[float]

    @property
    def rate(self) -> float:
        """Answers of 200 in a second."""
        return self.statuses.get(200, 0) / self.seconds

    def percentile(self, share: float) -> float:
        return self.milliseconds[min(len(self.milliseconds) - 1, int(share * len(self.milliseconds)))]


def run(model: Path, images: Images, seconds: float, threads: int, rounds: int) -> dict[str, Any]:
    """Rates, times and shares, each the median of `rounds` in which everything has a turn.

    Args:
        model: a folder `<models>/<name>/<version>`.
        images: (M, H, W) bytes, for raw runs and the bulk.
        seconds: of each load.

    Raises:
        Missing: h2load is not installed.
    """
    require_h2load()
    manifest = read_manifest(model)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        bodies = _write_bodies(images, folder)
        precisions = [precision for precision in PRECISIONS if precision in manifest.encoders("cpu")]
        found = {
            precision: _of_precision(model, manifest, precision, images, bodies, seconds, threads, rounds)
            for precision in precisions
        }
    return {"threads": threads, "rounds": rounds, "seconds": seconds, "precisions": found}


def require_h2load() -> None:
    """Say at once what is missing.

    Raises:
        Missing: h2load is not installed.
    """
    if shutil.which("h2load") is None:
        raise Missing("a served load needs h2load (Debian: apt-get install nghttp2-client)")


def _write_bodies(images: Images, folder: Path) -> dict[str, Path]:
    bodies = {"png": DIGIT, "npy": folder / "npy"}
    bulk = io.BytesIO()
    np.save(bulk, np.resize(images, (BULK, *images.shape[1:])))
    bodies["npy"].write_bytes(bulk.getvalue())
    return bodies


def _of_precision(
    model: Path,
    manifest: Manifest,
    precision: Precision,
    images: Images,
    bodies: dict[str, Path],
    seconds: float,
    threads: int,
    rounds: int,
) -> dict[str, Any]:
    encoder = model / manifest.encoders("cpu")[precision].file
    raw = open_session(encoder, threads)
    rows: list[dict[str, float]] = []
    with _serving(model, precision) as service, least.serving(encoder, threads) as least_port:
        for _ in range(rounds):
            rows.append(_round(service, least_port, raw, images, bodies, seconds))
            print(f"  {precision}: " + ", ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()))
        memory = service.memory()
    starts = [_start_seconds(model, precision) for _ in range(STARTS)]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {**medians, "memory_mib": memory / 2**20, "start_seconds": statistics.median(starts)}


def _round(
    service: Served,
    least_port: int,
    raw: ort.InferenceSession,
    images: Images,
    bodies: dict[str, Path],
    seconds: float,
) -> dict[str, float]:
    best, alone = _raw(raw, images, seconds)
    figures = {"raw_rate": best, "raw_alone_ms": 1000 * alone}
    for callers in CONCURRENCIES:
        load = h2load(service.port, "/predict", bodies["png"], "image/png", callers, seconds)
        figures |= {
            f"rate_{callers}": load.rate,
            f"share_{callers}": load.rate / best,
            f"p50_{callers}": load.percentile(0.5),
            f"p99_{callers}": load.percentile(0.99),
            f"spread_{callers}": load.percentile(0.99) / load.percentile(0.5),
            f"refused_{callers}": load.statuses.get(503, 0) / load.seconds,
        }
    for callers in LEAST_CONCURRENCIES:
        load = h2load(least_port, "/predict", bodies["png"], "image/png", callers, seconds)
        figures[f"least_share_{callers}"] = load.rate / best
    time.sleep(2)  # connections that were refused rest a second, and on a slow machine some are still read
    figures |= _processor_ms(service, raw, images, bodies["png"], seconds)
    figures["added_ms"] = figures["p50_1"] - figures["raw_alone_ms"]
    figures["goodput"] = figures["rate_512"] / figures["rate_32"]
    bulk_seconds = max(seconds, 4 * BULK / best)  # enough for a few of them on a slow processor too
    bulk = h2load(service.port, "/predict", bodies["npy"], "application/x-npy", 2, bulk_seconds, whole=True)
    figures["bulk_share"] = BULK * bulk.rate / best
    sweep, single = _sweep_and_single(service, bodies["png"].read_bytes())
    figures["sweep_ratio"] = sweep / single
    return figures


def _raw(session: ort.InferenceSession, images: Images, seconds: float) -> tuple[float, float]:
    """Images a second at the best batch size, and the seconds of a lone one."""
    tasks: dict[str, Callable[[], object]] = {}
    for batch in RAW_BATCHES:
        rows = np.ascontiguousarray(np.resize(images, (batch, *images.shape[1:])))
        tasks[str(batch)] = lambda rows=rows: session.run(None, {"images": rows})  # type: ignore[misc] # bound now
    medians = take_turns(tasks, seconds)
    return max(int(batch) / median for batch, median in medians.items()), medians["1"]


def _processor_ms(
    service: Served, raw: ort.InferenceSession, images: Images, body: Path, seconds: float
) -> dict[str, float]:
    """Milliseconds of processor time for a request of 32 callers, by who spends them, and for a raw image.

    What the event loop and the load generator take, the graph's threads do not get.
    """
    own, children = _thread_seconds(service.process.pid), _children_seconds()
    load = h2load(service.port, "/predict", body, "image/png", 32, seconds, warm_up=0)
    answered = load.statuses[200]
    loop, others = (
        1000 * (after - before) / answered
        for before, after in zip(own, _thread_seconds(service.process.pid), strict=True)
    )
    rows = np.ascontiguousarray(np.resize(images, (16, *images.shape[1:])))
    began, runs = time.process_time(), 20
    for _ in range(runs):
        raw.run(None, {"images": rows})
    return {
        "loop_cpu_ms": loop,
        "graph_cpu_ms": others,
        "client_cpu_ms": 1000 * (_children_seconds() - children) / answered,
        "raw_cpu_ms": 1000 * (time.process_time() - began) / runs / len(rows),
    }


def _thread_seconds(pid: int) -> tuple[float, float]:
    """Processor time of a process's main thread, and of all its other threads (Linux)."""
    spent = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            spent[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    main = spent.pop(str(pid))
    return main, sum(spent.values())


def _children_seconds() -> float:
    """Processor time of the processes that this one has started and seen end."""
    times = os.times()
    return times.children_user + times.children_system


def h2load(
    port: int,
    path: str,
    body: Path,
    media_type: str,
    callers: int,
    seconds: float,
    *,
    whole: bool = False,
    warm_up: int = 1,
) -> Load:
    """Let `callers` ask again and again, one request at a time each, for `seconds` after a warm-up's.

    Args:
        whole: count from the first request's start to the last one's end, since few long requests fit into
            any time; and let answers be arrays.
    """
    seconds = max(1, round(seconds))  # it takes whole ones
    with tempfile.NamedTemporaryFile("r") as file:
        command = [
            "h2load",
            "--h1",
            f"--clients={callers}",
            f"--duration={seconds}",
            f"--warm-up-time={warm_up}",
        ]
        command += [f"--data={body}", f"--header=content-type: {media_type}", f"--log-file={file.name}"]
        command += ["--header=accept: application/x-npz"] if whole else []
        subprocess.run([*command, f"http://127.0.0.1:{port}{path}"], check=True, capture_output=True)  # noqa: S603 - fixed words
        lines = [line.split() for line in file]  # start in us, status, duration in us
    statuses: dict[int, int] = defaultdict(int)
    for _, status, _ in lines:
        statuses[int(status)] += 1
    times = sorted(int(duration) / 1000 for _, status, duration in lines if status == "200")
    if not times:
        raise RuntimeError(f"h2load got no answer of 200 from {path}: {dict(statuses)}")
    if not whole:
        return Load(seconds, dict(statuses), times)
    began = min(int(start) for start, _, _ in lines)
    ended = max(int(start) + int(duration) for start, status, duration in lines if status == "200")
    return Load((ended - began) / 1e6, dict(statuses), times)


def _sweep_and_single(service: Served, png: bytes) -> tuple[float, float]:
    """Median seconds of a sweep of 16 dimensions and 11 deltas as a PNG, and of a prediction, in turns."""
    form = {"image": ("digit.png", png, "image/png")}

    def sweep() -> int:
        accept = {"accept": "image/png"}
        return service.client.post("/reconstruct/sweep", files=form, headers=accept).status_code

    def single() -> int:
        kind = {"content-type": "image/png"}
        return service.client.post("/predict", content=png, headers=kind).status_code

    times: dict[str, list[float]] = {"sweep": [], "single": []}
    for _ in range(15):
        for name, ask in (("sweep", sweep), ("single", single)):
            began = time.perf_counter()
            status = ask()
            times[name].append(time.perf_counter() - began)
            if status != 200:
                raise RuntimeError(f"a {name} was answered with {status}")
    return statistics.median(times["sweep"]), statistics.median(times["single"])


def _serving(model: Path, precision: Precision) -> AbstractContextManager[Served]:
    return served(model.parents[1], default_model=model.parent.name, precision=precision)


def _start_seconds(model: Path, precision: Precision) -> float:
    """From the start of the process to the first /readyz that says so."""
    began = time.perf_counter()
    with _serving(model, precision) as service:
        connection = http.client.HTTPConnection("127.0.0.1", service.port)
        connection.request("GET", "/readyz")
        if connection.getresponse().status != 200:
            raise RuntimeError("the service is up, but not ready")
        connection.close()
        return time.perf_counter() - began


@dataclass(frozen=True)
class Aim:
    """A figure that was set beforehand."""

    what: str
    precision: Precision
    figure: str
    bound: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


AIMS = (
    Aim("32 callers, share of raw at its best batch", "fp32", "share_32", 0.92),
    Aim("64 callers, the same", "fp32", "share_64", 0.92),
    Aim("8 callers, the same", "fp32", "share_8", 0.75),
    Aim("32 callers, p99 over p50", "fp32", "spread_32", 1.25, at_most=True),
    Aim("64 callers, the same", "fp32", "spread_64", 1.25, at_most=True),
    Aim("512 callers who do not wait, answers over those at 32", "fp32", "goodput", 0.95),
    Aim("1,024 images as npy in, npz out, share of raw at its best batch", "fp32", "bulk_share", 0.97),
    Aim("one caller, p50 less raw at batch 1, ms", "fp32", "added_ms", 0.5, at_most=True),
    Aim("a 16x11 sweep with its PNG over one prediction, in time", "fp32", "sweep_ratio", 3, at_most=True),
    Aim("from exec to ready, s", "int8", "start_seconds", 1.5, at_most=True),
    Aim("resident after load, MiB", "int8", "memory_mib", 260, at_most=True),
)
FASTER = 1.9
"""What 8-bit convolutions should bring served at 32 callers, over fp32."""


def markdown(part: dict[str, Any]) -> str:
    found = part["precisions"]
    lines = [
        f"## Served over HTTP ({part['threads']} threads, {part['machine']})",
        "",
        "One process, PNG to /predict, loaded by h2load on the same cores; medians of "
        f"{part['rounds']} rounds in which raw `session.run` and each load have a turn of "
        f"{part['seconds']:g} s. Refused are those of 512 callers that found the queue of 256 full; none of "
        "them waits as Retry-After says.",
    ]
    for precision, row in found.items():
        rows = [
            [
                callers,
                f"{row[f'rate_{callers}']:.0f}",
                f"{row[f'share_{callers}']:.2f}",
                f"{row[f'p50_{callers}']:.1f}",
                f"{row[f'p99_{callers}']:.1f}",
                f"{row[f'refused_{callers}']:.0f}",
            ]
            for callers in CONCURRENCIES
        ]
        head = ["callers", "images/s", "share of raw", "p50, ms", "p99, ms", "refused/s"]
        lines += ["", f"### {precision}: raw {row['raw_rate']:.0f} images/s at its best batch", ""]
        lines.append(table(head, rows))
        if "least_share_1" in row:  # not measured before there was one
            shares = ", ".join(f"{row[f'least_share_{callers}']:.2f}" for callers in LEAST_CONCURRENCIES)
            counts = ", ".join(map(str, LEAST_CONCURRENCIES))
            lines += [
                "",
                f"What anything on uvicorn has to do, and nothing else (`benchmarks/least.py`), had {shares} "
                f"of raw with {counts} callers.",
            ]
    rows = [
        [
            f"{aim.what} ({aim.precision})",
            f"{'≤' if aim.at_most else '≥'} {aim.bound:g}",
            f"{found[aim.precision][aim.figure]:.3g}",
            "yes" if aim.met(found[aim.precision][aim.figure]) else "no",
        ]
        for aim in AIMS
        if aim.precision in found
    ]
    if {"fp32", "int8"} <= found.keys():
        faster = found["int8"]["rate_32"] / found["fp32"]["rate_32"]
        what = "32 callers, int8 over fp32"
        rows.append([what, f"≥ {FASTER:g}", f"{faster:.3g}", "yes" if faster >= FASTER else "no"])
        lines += ["", *(f"{precision}: {', '.join(_beside(row))}.\n" for precision, row in found.items())]
    lines += ["", table(["figure", "aim", "measured", "met"], rows)]
    return "\n".join(lines)


def _beside(row: dict[str, float]) -> list[str]:
    return [
        f"p99 over p50 {row['spread_32']:.2f} and {row['spread_64']:.2f} at 32 and 64 callers",
        f"goodput {row['goodput']:.2f}",
        f"npy {row['bulk_share']:.2f} of raw",
        f"{row['added_ms']:.2f} ms added for one caller",
        f"a sweep {row['sweep_ratio']:.1f} predictions",
        f"ready after {row['start_seconds']:.2f} s",
        f"{row['memory_mib']:.0f} MiB",
        "processor time for one of 32 callers' requests "
        f"{row['graph_cpu_ms']:.2f} ms in the graphs (raw {row['raw_cpu_ms']:.2f}), "
        f"{row['loop_cpu_ms']:.2f} in the event loop, {row['client_cpu_ms']:.2f} in h2load",
    ]


def plot(part: dict[str, Any], path: Path) -> None:
    """Share of raw, and the times of the median and the slowest hundredth, over the number of callers."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    shares, times = figure.subplots(1, 2)
    for precision, row in part["precisions"].items():
        for name, axes, style in (("share", shares, "-"), ("p50", times, "-"), ("p99", times, "--")):
            values = [row[f"{name}_{callers}"] for callers in CONCURRENCIES]
            label = precision if name == "share" else f"{precision}, {name}"
            axes.plot(CONCURRENCIES, values, style, marker="o", label=label)
    shares.set(ylabel="images/s, share of raw session.run", ylim=(0, 1))
    times.set(ylabel="ms", yscale="log")
    for axes in (shares, times):
        axes.set(xlabel="callers", xscale="log")
        axes.set_xticks(CONCURRENCIES, [str(callers) for callers in CONCURRENCIES])
        axes.minorticks_off()
        axes.legend(loc="lower right")  # beneath what rises
    figure.savefig(path, dpi=110)
