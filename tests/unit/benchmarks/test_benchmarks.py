"""The benchmarks run, compare like with like, and write down what they found; never how long it took."""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import __main__ as command
from benchmarks import least, loop, offline, report, served, through_openvino, timing, training_step, workers
from service.images import encode_png
from tests.support.mnist import ROOT
from training.config import ModelConfig
from training.trained import read_exported

MODEL = command.newest(ROOT / "models" / "mnist")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped encoder in every form."""
    return offline.write_graphs(read_exported(MODEL), IMAGES, tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of one run, and loads without a warm-up: what is measured is not what is tested."""
    monkeypatch.setattr(timing, "TURN", 0)
    for module in (loop, served, workers):
        monkeypatch.setattr(module, "h2load", partial(served.h2load, warm_up=0))


def numbered(tasks: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Each takes its turns, and then is said to have taken a half of a second, a quarter, an eighth…"""
    return {name: 0.5**place for place, name in enumerate(timing.take_turns(tasks, seconds), 1)}


def test_everybody_has_a_turn_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task warms up, is tried once to see how long a turn must be, and then takes turns."""
    monkeypatch.setattr(timing, "TURN", 0)
    calls: list[str] = []
    medians = timing.take_turns({name: partial(calls.append, name) for name in ("a", "b")}, 0, least=4)
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 4]
    assert set(medians) == {"a", "b"}


def test_a_task_takes_what_one_run_took_in_its_middle_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn has as many runs as fill it, and turns go on while there is time."""
    runs = iter([50, 1, 1, 1, 1, 9, *[9] * 4, *[5] * 4])
    spent: list[int] = []
    monkeypatch.setattr(timing, "TURN", 4)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: sum(spent)))
    assert timing.take_turns({"a": lambda: spent.append(next(runs))}, 49, least=1) == {"a": 5}


def test_the_forms_agree(graphs: dict[str, Path]) -> None:
    """What is compared in speed computes the same: fp32 to six digits, int8 to two."""
    outputs = {}
    for name, path in graphs.items():
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs[name] = session.run(["digit_capsules"], {"images": IMAGES})[0]
    np.testing.assert_allclose(outputs["fp32"], outputs["plain einsum"], atol=1e-5)
    np.testing.assert_allclose(outputs["fp32, direct"], outputs["plain einsum"], atol=1e-5)
    np.testing.assert_allclose(outputs["int8"], outputs["plain einsum"], atol=5e-2)


@pytest.mark.usefixtures("hasty")
def test_offline_and_profile(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every form has a figure for every batch size, next to its ceilings, in table, JSON and plot."""
    monkeypatch.setattr(offline, "write_graphs", lambda *_: graphs)
    monkeypatch.setattr(offline, "BATCHES", (3, 8))
    monkeypatch.setattr(offline, "GEMM", 100)
    monkeypatch.setattr(offline, "take_turns", numbered)
    monkeypatch.setattr(through_openvino, "version", lambda: through_openvino.ABSENT)
    threads = torch.get_num_threads()
    measured = {
        "offline": offline.run(MODEL, IMAGES, 0, threads=1),
        "profile": offline.profile(MODEL, IMAGES, batch=2, runs=2),
    }
    torch.set_num_threads(threads)
    assert measured["offline"]["rows"] == [
        {
            "batch": 3,
            "images_per_second": {
                "plain einsum": 6,
                "fp32, direct": 12,
                "fp32": 24,
                "int8": 48,
                "the two convolutions alone": 96,
            },
            "sgemm_gflops": 0.128,
        }
    ]
    assert measured["offline"]["openvino"] == "not installed"
    assert "Einsum" in measured["profile"]["microseconds"]["plain einsum"]
    assert "Einsum" not in measured["profile"]["microseconds"]["fp32"]
    assert "MatMulInteger" in measured["profile"]["microseconds"]["int8"]
    report.write({name: {"machine": "a test", **part} for name, part in measured.items()}, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "## Offline inference (1 threads, a test)" in text
    assert "\n| 3 | 6 (1.00x) | 12 (2.00x) | 24 (4.00x) | 48 (8.00x) | 96 (16.00x) | 0 |\n" in text
    assert "OpenVINO: not installed." in text
    assert (tmp_path / "benchmarks.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped encoder in 8 bits, as OpenVINO gets it."""
    return offline.write_pairs(read_exported(MODEL), IMAGES, tmp_path_factory.mktemp("openvino"))


def test_pairs_are_the_same_numbers(graphs: dict[str, Path], pairs: Path) -> None:
    """What OpenVINO gets in 8 bits computes the 8-bit encoder, but for features on the edge of two bytes."""
    graph = onnx.load(pairs).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"QLinearConv", "MatMulInteger"} & set(kinds)
    assert kinds.count("Conv") == 2
    found, expected = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": IMAGES})[0]
        for path in (pairs, graphs["int8"])
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.skipif(
    through_openvino.version() == through_openvino.ABSENT, reason="OpenVINO is not installed: an option"
)
def test_openvino_agrees(graphs: dict[str, Path], pairs: Path) -> None:
    """Its fp32 and 8-bit encoders give what ONNX Runtime's give."""
    for path, name, tolerance in ((graphs["fp32, direct"], "fp32", 1e-5), (pairs, "int8", 1e-3)):
        session = ort.InferenceSession(graphs[name], providers=["CPUExecutionProvider"])
        expected = session.run(None, {"images": IMAGES})[0]
        found = through_openvino.compiled(path, IMAGES, 1)()
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.usefixtures("hasty")
def test_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step and its convolutions are measured in both arithmetics, with the peak memory of each."""
    monkeypatch.setattr(training_step, "take_turns", numbered)
    small = ModelConfig(("a", "b"), height=9, width=9, conv_channels=4, kernel_size=3, primary_groups=2)
    measured = training_step.run(0, torch.get_num_threads(), small, batch=6)
    assert measured["images_per_second"] == {
        "step, fp32": 12,
        "the two convolutions alone, fp32": 24,
        "step, bf16": 48,
        "the two convolutions alone, bf16": 96,
    }
    assert set(measured["peak_mib"]) == {"fp32", "bf16"}
    assert all(100 < peak < 2000 for peak in measured["peak_mib"].values()), "PyTorch alone takes as much"
    report.write({"training": {"machine": "a test", **measured}}, tmp_path)
    report.write({"other": {}}, tmp_path)
    assert set(json.loads((tmp_path / "benchmarks.json").read_text())) == {"training", "other"}, (
        "parts add up"
    )
    assert "## A training step (batch 6" in (tmp_path / "benchmarks.md").read_text()


def test_least_times_by_operator() -> None:
    """Of each node the fastest run counts, and nodes of one kind add up."""

    def event(kind: str, name: str, microseconds: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": kind}}

    events = [event("Conv", "a", 9), event("Conv", "a", 5), event("Conv", "b", 2), event("Mul", "c", 8)]
    assert offline.by_operator([*events, {"cat": "Session", "name": "run", "dur": 1}]) == {
        "Mul": 8,
        "Conv": 7,
    }


def test_an_unknown_part(capsys: pytest.CaptureFixture[str]) -> None:
    """A part that is not there is refused with those that are."""
    with pytest.raises(SystemExit):
        command.main(["gpu"])
    assert (
        "unknown parts ['gpu'], expected some of "
        f"{[*command.PARTS, *command.ASKED_FOR]}" in capsys.readouterr().err
    )


@pytest.mark.usefixtures("hasty")
@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_served(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each load has its rate, its share of raw and its times, and each aim is judged by its figure."""
    monkeypatch.setattr(served, "BULK", 8)
    monkeypatch.setattr(served, "STARTS", 1)
    measured = served.run(tiny_models / "tiny" / "2", IMAGES, 1, threads=1, rounds=1)
    row = measured["precisions"]["fp32"]
    assert row["rate_32"] > row["refused_32"] == 0
    assert row["p50_1"] <= row["p99_1"]
    assert min(row[f"{who}_cpu_ms"] for who in ("graph", "raw", "loop", "client")) > 0
    assert all(row[f"least_share_{callers}"] > 0 for callers in served.LEAST_CONCURRENCIES)
    report.write({"served": {"machine": "a test", **measured}}, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "## Served over HTTP (1 threads, a test)" in text
    assert f"(`benchmarks/least.py`), had {row['least_share_1']:.2f}, " in text
    assert (tmp_path / "served.png").stat().st_size > 0


def test_the_least_service_answers_rightly(tiny_models: Path) -> None:
    """Callers who come together get the lengths that the graph gives each of their images."""
    encoder = tiny_models / "tiny" / "2" / "encoder.onnx"
    images = np.random.default_rng(0).integers(0, 256, (12, *IMAGES.shape[1:]), np.uint8)
    (expected,) = offline.open_session(encoder, 1).run(["capsule_lengths"], {"images": images})

    def ask(image: NDArray[np.uint8]) -> list[float]:
        answer = httpx2.post(f"http://127.0.0.1:{port}/predict", content=encode_png(image)).json()
        assert answer["class"] == np.argmax(answer["lengths"])
        return list(answer["lengths"])

    with least.serving(encoder, 1) as port, ThreadPoolExecutor(len(images)) as threads:
        np.testing.assert_allclose(list(threads.map(ask, images)), expected, atol=1e-6)


@pytest.mark.usefixtures("hasty")
@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_served_by_workers(tiny_models: Path, tmp_path: Path) -> None:
    """Every number of processes has a row for every number of callers, all of whom are answered."""
    measured = workers.run(
        tiny_models / "tiny" / "2", 1, rounds=1, workers=[1, 2], callers=[1, 3], device="cpu"
    )
    assert [(row["workers"], row["callers"]) for row in measured["rows"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert all(row["rate"] > row["refused"] == 0 < row["p50"] <= row["p99"] for row in measured["rows"])
    assert measured["device"] == "cpu"
    report.write({"cuda-served": {"machine": "a test", **measured}}, tmp_path)
    assert "PNG to /predict in fp32 on cpu" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.usefixtures("hasty")
@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_the_loops_profile(tiny_models: Path, tmp_path: Path) -> None:
    """The profile has the packages that a request passes through, with what each costs."""
    measured = loop.run(tiny_models / "tiny" / "2", 1)
    packages = measured["packages"]
    assert {"PIL", "uvicorn", "service/routes.py"} <= packages.keys()
    assert all(row["microseconds"] > 0 for row in packages.values() if row["calls"] >= 1)
    report.write({"loop": {"machine": "a test", **measured}}, tmp_path)
    assert "| PIL |" in (tmp_path / "benchmarks.md").read_text()


def test_time_of_what_is_not_python_is_its_callers() -> None:
    """A built-in function counts with the file that called it, and waiting for events with nobody."""
    a, b = ("/x/site-packages/PIL/Image.py", 1, "open"), ("/x/service/images.py", 2, "prepare")
    profile = {
        a: (2, 2, 0.5, 9.0, {}),
        b: (1, 1, 0.25, 9.0, {}),
        ("~", 0, "<len>"): (5, 5, 3.0, 3.0, {a: (4, 4, 1.0, 1.0), b: (1, 1, 2.0, 2.0)}),
        ("/x/asyncio/runners.py", 3, "run"): (1, 1, 60.0, 60.0, {}),
    }
    assert loop.by_package(profile) == {"service/images.py": (2, 2.25), "PIL": (6, 1.5)}


@pytest.mark.parametrize(
    ("figure", "value", "said"),
    [
        ("share_32", 0.91, "32 callers, share of raw at its best batch (fp32) | ≥ 0.92 | 0.91 | no"),
        ("share_32", 0.92, "32 callers, share of raw at its best batch (fp32) | ≥ 0.92 | 0.92 | yes"),
        ("spread_32", 1.25, "32 callers, p99 over p50 (fp32) | ≤ 1.25 | 1.25 | yes"),
        ("spread_32", 1.26, "32 callers, p99 over p50 (fp32) | ≤ 1.25 | 1.26 | no"),
        ("rate_32", 1.89, "32 callers, int8 over fp32 | ≥ 1.9 | 1.89 | no"),
        ("rate_32", 1.9, "32 callers, int8 over fp32 | ≥ 1.9 | 1.9 | yes"),
    ],
)
def test_an_aim_is_met_at_its_bound(figure: str, value: float, said: str) -> None:
    """A figure at its bound counts, one short of it does not; what the table says is what was measured."""
    row = {
        f"{name}_{callers}": 1.0
        for name in ("rate", "share", "p50", "p99", "refused", "spread")
        for callers in served.CONCURRENCIES
    }
    others = ("raw_rate", "goodput", "bulk_share", "added_ms", "sweep_ratio", "start_seconds", "memory_mib")
    spent = ("graph_cpu_ms", "raw_cpu_ms", "loop_cpu_ms", "client_cpu_ms")
    row |= dict.fromkeys(others + spent, 1.0)
    changed = "int8" if figure == "rate_32" else "fp32"
    found = {"fp32": row, "int8": row} | {changed: row | {figure: value}}
    part = {"machine": "a test", "threads": 1, "rounds": 1, "seconds": 1, "precisions": found}
    assert f"\n| {said} |" in report.markdown({"served": part})


def test_a_missing_load_generator_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without h2load the served part says in one line what is missing, and where it comes from."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(served.Missing, match="nghttp2-client"):
        served.run(MODEL, IMAGES, 1, threads=1, rounds=1)
