"""What docs/results publishes is what was measured, in the units and beside what its heads say."""

import itertools
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest

from benchmarks import loop, report, served, workers
from benchmarks.frameworks import comparison
from benchmarks.served import DIGIT, Load
from benchmarks.timing import CONVOLUTIONS

ANYWHERE: dict[str, Any] = {"machine": "a test", "threads": 1, "rounds": 3, "seconds": 10}


def nothing(*_: object) -> None:
    """What a fake does that is told to wait, to run or to end."""


SERVICE: Any = SimpleNamespace(
    port=1, process=SimpleNamespace(pid=7, send_signal=nothing, terminate=nothing, wait=nothing)
)


def load(rate: float, p50: float, p99: float, refused: int = 0) -> Load:
    """One of ten seconds, in which half of the answers took no time at all."""
    statuses = {200: round(10 * rate), 503: 10 * refused}
    return Load(10, statuses, [*[0.0] * 50, *[p50] * 49, p99])


def test_ratios_are_to_what_is_named() -> None:
    """Forms stand beside the plain one, operators beside the whole, and a step beside its convolutions."""
    offline = {
        "rows": [
            {
                "batch": 1,
                "images_per_second": {"plain einsum": 100, "int8": 250, CONVOLUTIONS: 400},
                "sgemm_gflops": 70,
            },
            {
                "batch": 8,
                "images_per_second": {"plain einsum": 200, "int8": 240, CONVOLUTIONS: 500},
                "sgemm_gflops": 60,
            },
        ]
    }
    profile = {"batch": 4, "microseconds": {"int8": {"Conv": 700, "Mul": 296, "Add": 4}}}
    speeds = {"step, bf16": 30, f"{CONVOLUTIONS}, bf16": 40}
    training = {"batch": 8, "images_per_second": speeds, "peak_mib": {"bf16": 512}}
    parts: dict[str, dict[str, Any]] = {"offline": offline, "profile": profile, "training": training}
    text = report.markdown({name: ANYWHERE | part for name, part in parts.items()})
    assert "\n| 1 | 100 (1.00x) | 250 (2.50x) | 400 (4.00x) | 70 |\n" in text
    assert "\n| 8 | 200 (1.00x) | 240 (1.20x) | 500 (2.50x) | 60 |\n" in text
    assert "over the plain export at its: int8 1.25x. " in text
    assert "\n| Conv | 175 | 70% |\n| Mul | 74 | 30% |\n\n" in text
    assert "\n| bf16 | 30 | 40 | 0.75 | 512 |\n" in text


def test_a_load_is_what_its_log_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 200 have times, in milliseconds; a whole load lasts to the last, others as long as asked."""

    def run(command: list[str], **_: object) -> None:
        file = next(word.removeprefix("--log-file=") for word in command if word.startswith("--log-file="))
        Path(file).write_text("1000000 503 9000000\n3000000 200 500000\n1500000 200 2000\n")

    monkeypatch.setattr(subprocess, "run", run)
    asked = served.h2load(1, "/predict", DIGIT, "image/png", 8, 2.4)
    assert asked == Load(2, {503: 1, 200: 2}, [2, 500])
    whole = served.h2load(1, "/predict", DIGIT, "image/png", 8, 2.4, whole=True)
    assert whole == Load(2.5, {503: 1, 200: 2}, [2, 500])


def test_a_round_of_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are by the second, shares of raw at its best batch, and times milliseconds of one request."""
    rates: dict[tuple[int, str], dict[int, float]] = {
        (1, "image/png"): {1: 100, 8: 500, 32: 800, 64: 900, 512: 760},
        (2, "image/png"): {1: 150, 8: 600, 32: 900, 64: 950},  # the least service
        (1, "application/x-npy"): {2: 0.5},
    }
    spent: list[float] = []

    def h2load(port: int, _: str, __: Path, kind: str, callers: int, *___: float, **____: object) -> Load:
        refused = 30 if callers == 512 else 0
        return load(rates[port, kind][callers], callers + 3.5, 2 * callers + 7 + refused, refused)

    def post(path: str, **_: object) -> httpx2.Response:
        spent.append(3 if path == "/reconstruct/sweep" else 2)
        return httpx2.Response(200)

    processor = iter((1.0, 4.2))
    clock = SimpleNamespace(
        sleep=nothing, perf_counter=lambda: sum(spent), process_time=lambda: next(processor)
    )
    threads, children = iter(((1, 10), (3, 26))), iter((5, 9))
    raw = {"1": 0.004, "8": 0.02, "16": 0.02, "32": 0.032, "64": 0.08}
    monkeypatch.setattr(served, "h2load", h2load)
    monkeypatch.setattr(served, "take_turns", lambda *_: raw)
    monkeypatch.setattr(served, "time", clock)
    monkeypatch.setattr(served, "_thread_seconds", lambda _: next(threads))
    monkeypatch.setattr(served, "_children_seconds", lambda: next(children))
    service: Any = SimpleNamespace(**vars(SERVICE), client=SimpleNamespace(post=post))
    session: Any = SimpleNamespace(run=nothing)
    bodies = {"png": DIGIT, "npy": Path("npy")}
    found = served._round(service, 2, session, np.zeros((1, 9, 9), np.uint8), bodies, 10)

    names = ("rate", "share", "p50", "p99", "spread", "refused")
    by_callers = {
        1: (100, 0.1, 4.5, 9, 2, 0),
        8: (500, 0.5, 11.5, 23, 2, 0),
        32: (800, 0.8, 35.5, 71, 2, 0),
        64: (900, 0.9, 67.5, 135, 2, 0),
        512: (760, 0.76, 515.5, 1061, 1061 / 515.5, 30),
    }
    expected = {"raw_rate": 1000, "raw_alone_ms": 4, "added_ms": 0.5, "goodput": 0.95, "bulk_share": 0.512}
    expected |= {"sweep_ratio": 1.5, "loop_cpu_ms": 0.25, "graph_cpu_ms": 2, "client_cpu_ms": 0.5}
    expected |= {"raw_cpu_ms": 10}
    expected |= {"least_share_1": 0.15, "least_share_8": 0.6, "least_share_32": 0.9, "least_share_64": 0.95}
    for callers, values in by_callers.items():
        expected |= {f"{name}_{callers}": value for name, value in zip(names, values, strict=True)}
    assert found == pytest.approx(expected)

    row = found | {"start_seconds": 1.25, "memory_mib": 200}
    text = report.markdown({"served": ANYWHERE | {"precisions": {"fp32": row, "int8": row}}})
    assert "\n### fp32: raw 1000 images/s at its best batch\n" in text
    assert "\n| 512 | 760 | 0.76 | 515.5 | 1061.0 | 30 |\n" in text
    assert " had 0.15, 0.60, 0.90, 0.95 of raw with 1, 8, 32, 64 callers." in text
    assert (
        "\nfp32: p99 over p50 2.00 and 2.00 at 32 and 64 callers, goodput 0.95, npy 0.51 of raw, 0.50 ms "
        "added for one caller, a sweep 1.5 predictions, ready after 1.25 s, 200 MiB, processor time for "
        "one of 32 callers' requests 2.00 ms in the graphs (raw 10.00), 0.25 in the event loop, 0.50 in "
        "h2load.\n"
    ) in text


def test_workers_have_the_medians_of_their_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure is the middle one of the rounds; those who were refused are counted by the second."""
    ready = {"models": [{"name": "tiny", "device": "cuda", "precision": "fp16"}]}
    client = SimpleNamespace(get=lambda _: httpx2.Response(200, json=ready))
    service = SimpleNamespace(port=1, client=client)
    rounds = iter((load(1000, 4, 9, 5), load(3000, 1, 30, 0), load(1100, 2, 8, 1)))
    monkeypatch.setattr(workers, "require_h2load", nothing)
    monkeypatch.setattr(workers, "served", lambda *_, **__: nullcontext(service))
    monkeypatch.setattr(workers, "h2load", lambda *_: next(rounds))
    measured = workers.run(Path("models/tiny/2"), 10, 3, [2], [32])
    assert measured["rows"] == [{"workers": 2, "callers": 32, "rate": 1100, "p50": 2, "p99": 9, "refused": 1}]
    text = report.markdown({"cuda-served": ANYWHERE | measured})
    assert "PNG to /predict in fp16 on cuda, " in text
    assert "\n| 2 | 32 | 1,100 | 2.0 | 9.0 | 1 |\n" in text


def test_the_loops_time_is_that_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and microseconds are of each of the requests that were answered, shares of all of them."""
    profile: dict[loop.Function, Any] = {
        ("/x/site-packages/PIL/Image.py", 1, "open"): (600, 600, 0.75, 0.75, {}),
        ("/x/service/routes.py", 1, "predict"): (100, 100, 0.25, 0.25, {}),
    }
    monkeypatch.setattr(loop, "require_h2load", nothing)
    monkeypatch.setattr(loop, "served", lambda *_, **__: nullcontext(SERVICE))
    monkeypatch.setattr(loop, "h2load", lambda *_, **__: load(10, 1, 1))
    monkeypatch.setattr(loop, "pstats", SimpleNamespace(Stats=lambda _: SimpleNamespace(stats=profile)))
    measured = loop.run(Path("models/tiny/2"), 10)
    assert measured["packages"] == {
        "PIL": {"calls": 6, "microseconds": 7500},
        "service/routes.py": {"calls": 1, "microseconds": 2500},
    }
    text = report.markdown({"loop": ANYWHERE | measured})
    assert "request, 7 and 10000 in all." in text
    assert "\n| PIL | 6 | 7500 | 75% |\n| service/routes.py | 1 | 2500 | 25% |\n" in text


def test_frameworks_are_beside_ours_and_raw(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its answers over ours and its share of raw, as medians of their rounds, the fastest first."""
    factors = itertools.chain.from_iterable([factor] * 4 for factor in (8, 1, 90))
    raw = iter((1 / 32, 1 / 8, 1 / 16))

    def h2load(*arguments: Any) -> Load:
        callers, factor = arguments[4], next(factors)
        return load(factor * callers, factor * callers / 4, factor * callers / 2)

    monkeypatch.setattr(comparison, "require_h2load", nothing)
    monkeypatch.setattr(comparison, "served", lambda *_, **__: nullcontext(SERVICE))
    monkeypatch.setattr(comparison, "h2load", h2load)
    monkeypatch.setattr(comparison, "take_turns", lambda *_: {"raw": next(raw)})
    measured = comparison.run(tiny_models / "tiny" / "2", "fp32", 10, 1, 3, frameworks=())
    assert measured["raw_rate"] == 512
    rates = {"rate_1": 8, "rate_8": 64, "rate_32": 256, "rate_64": 512}
    times = {"p50_1": 2, "p50_8": 16, "p50_32": 64, "p50_64": 128}
    slowest = {"p99_1": 4, "p99_8": 32, "p99_32": 128, "p99_64": 256}
    assert measured["rows"] == {comparison.OURS: rates | times | slowest}

    measured["rows"]["Other"] = times | slowest | {"rate_8": 160, "rate_32": 128, "rate_64": 128, "p50_1": 7}
    measured["chosen"]["Other"] = {"version": "1.2", "settings": {"1": "1 x 1 threads"}}
    text = report.markdown({"frameworks": ANYWHERE | measured})
    assert (
        "\n| **this service** | 2.0 | 64 (1.00x) | 256 (1.00x) | 512 (1.00x) | 0.50 | 256 |\n"
        "| Other 1.2 | 7.0 | 160 (2.50x) | 128 (0.50x) | 128 (0.25x) | 0.25 | 256 |\n"
    ) in text
