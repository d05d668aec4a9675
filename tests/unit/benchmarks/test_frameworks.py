"""Other frameworks are asked the same as ours, and only what answers rightly is measured."""

import re
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.frameworks import comparison, processes
from benchmarks.frameworks.contenders import FRAMEWORKS, Framework, Setting, Work
from benchmarks.served import h2load
from tests.support.mnist import ROOT

MODEL = command.newest(ROOT / "models" / "mnist")
TUTORIAL = FRAMEWORKS[0]
"""It needs nothing that this environment lacks."""
NOTHING = Work(MODEL, MODEL, np.zeros(1, "f4"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads that begin at once, of a framework that is installed."""
    monkeypatch.setattr(comparison, "CONCURRENCIES", (1, 32, 64))
    monkeypatch.setattr(comparison, "installed", lambda _: Path(sys.executable))
    monkeypatch.setattr(comparison, "h2load", partial(h2load, warm_up=0))


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
@pytest.mark.usefixtures("quick")
def test_the_tutorial_beside_ours(tiny_models: Path, tmp_path: Path) -> None:
    """Both are loaded in each round, and the table has the answers of each as a share of ours."""
    tiny = tiny_models / "tiny" / "2"
    measured = comparison.run(tiny, "fp32", 1, threads=1, rounds=1, frameworks=(TUTORIAL,))
    assert set(measured["rows"]) == {comparison.OURS, TUTORIAL.name}
    assert all(row["rate_32"] > 0 and row["p99_64"] > 0 for row in measured["rows"].values())
    assert measured["chosen"][TUTORIAL.name]["settings"] == dict.fromkeys(("1", "32", "64"), "1 x 1 threads")
    report.write({"frameworks": {"machine": "a test", **measured}}, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| **this service** |" in text
    assert f"| {TUTORIAL.name} {version('fastapi')} |" in text
    ours, tutorial = (measured["rows"][name]["rate_64"] for name in (comparison.OURS, TUTORIAL.name))
    assert f" | {tutorial:.0f} ({tutorial / ours:.2f}x) | " in text
    assert f"| {TUTORIAL.name} | 1 x 1 threads | 1 x 1 threads | 1 x 1 threads |" in text


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
@pytest.mark.usefixtures("quick")
def test_ours_with_a_worker_for_each_thread(tiny_models: Path, tmp_path: Path) -> None:
    """Where there are several threads, ours has a second row with as many workers."""
    tiny = tiny_models / "tiny" / "2"
    measured = comparison.run(tiny, "fp32", 1, threads=2, rounds=1, frameworks=())
    assert set(measured["rows"]) == {comparison.OURS, "this service, 2 workers"}
    assert all(row["rate_32"] > 0 for row in measured["rows"].values())
    report.write({"frameworks": {"machine": "a test", **measured}}, tmp_path)
    assert "| **this service, 2 workers** |" in (tmp_path / "benchmarks.md").read_text()


def test_what_is_served_in_int8_is_compared_in_int8() -> None:
    """All get the 8-bit encoder, and have to answer as it does, which the fp32 one does not quite."""
    fp32, int8 = (comparison._work(MODEL, precision) for precision in ("fp32", "int8"))
    assert int8.encoder.name == "encoder.int8.onnx"
    assert int8.decoder == fp32.decoder
    assert not np.allclose(int8.expected, fp32.expected, atol=1e-4)
    np.testing.assert_allclose(int8.expected, fp32.expected, rtol=0.05, atol=0.02)


def test_a_precision_that_a_model_lacks_is_not_measured(tiny_models: Path) -> None:
    """What it has is said before anything is installed."""
    with pytest.raises(processes.FrameworkError, match=r"tiny/2 has its encoder in fp32 and not in int8"):
        comparison._work(tiny_models / "tiny" / "2", "int8")


def test_each_load_has_the_setting_that_was_best_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience that costs a lone caller and helps many is used for the many alone."""
    impatient, patient = Setting(1, 1, 1), Setting(1, 1, 10)
    rates = {impatient: {1: 9.0, 8: 8.0, 32: 5.0, 64: 5.0}, patient: {1: 1.0, 8: 7.0, 32: 6.0, 64: 6.0}}

    def loaded(_: object, setting: Setting, __: object, concurrencies: Iterable[int]) -> dict[str, float]:
        return {f"rate_{callers}": rates[setting][callers] for callers in concurrencies}

    monkeypatch.setattr(comparison._Contender, "loaded", loaded)
    waits = replace(TUTORIAL, waits=True)
    contender = comparison._Contender(waits, Path(), NOTHING)
    loads = comparison._Loads(Path(), 1)
    best, tried = contender.choose(1, loads)
    assert best == {1: impatient, 8: impatient, 32: patient, 64: patient}
    assert tried[str(patient)]["rate_8"] == 7
    assert contender.turn(best, loads) == {"rate_1": 9, "rate_8": 8, "rate_32": 6, "rate_64": 6}


def test_settings_are_tried() -> None:
    """One worker and several, on as many threads in all; long and short waits, where there is one to set."""
    assert comparison.settings(4, waits=False) == [Setting(1, 4, None), Setting(4, 1, None)]
    assert comparison.settings(2, waits=True) == [
        Setting(1, 2, 1),
        Setting(1, 2, 10),
        Setting(2, 1, 1),
        Setting(2, 1, 10),
    ]
    assert comparison.settings(1, waits=False) == [Setting(1, 1, None)]


@pytest.mark.parametrize(
    ("path", "wrong", "said"),
    [
        ("/predict", 0, r"it answers \[.*\] instead of {}"),
        ("/predict", -1, r"it answers \[.*\] instead of {}"),
        ("/absent", 0, r"no answer of 200.*404, b'.*Not Found"),
    ],
    ids=["length", "error", "absent"],
)
def test_what_answers_otherwise_is_not_measured(
    path: str, wrong: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A framework whose results are not the graphs', or that gives none, is at once an error with its log."""
    monkeypatch.setattr(processes, "START_LIMIT", 5)
    work = comparison._work(MODEL, "fp32")
    work.expected[wrong] += 0.001
    said = said.format(re.escape(str(work.expected)))
    framework = replace(TUTORIAL, path=path)
    with (
        pytest.raises(processes.FrameworkError, match=rf"(?s){said}.*Uvicorn running"),
        processes.running(framework, Path(sys.executable), work, Setting(1, 1, 1)),
    ):
        pass
    assert not capsys.readouterr().out


def test_what_never_starts_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A framework that ends while it starts, each of three times, is an error with what it said."""
    framework = replace(TUTORIAL, command=("-c", "raise SystemExit('no room')"))
    with (
        pytest.raises(processes.FrameworkError, match=r"(?s)it ended with 1.*no room"),
        processes.running(framework, Path(sys.executable), NOTHING, Setting(1, 1, 1)),
    ):
        pass
    printed = capsys.readouterr().out
    assert printed.count("it is started again") == printed.count("no room") == 2


def test_what_starts_the_second_time_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failed start does not lose what was measured of the others."""
    framework = answering('{"lengths": [], "reconstruction_error": 0}', tmp_path, monkeypatch)
    first = tmp_path / "first"
    first.touch()
    failing = f"from pathlib import Path\nfirst = Path({str(first)!r})\n"
    failing += "if first.exists():\n    first.unlink()\n    raise SystemExit('not yet')\n"
    (tmp_path / "server.py").write_text(failing + SERVER)
    with processes.running(framework, Path(sys.executable), NOTHING, Setting(1, 1, 1)):
        assert not first.exists()


SERVER = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
Path("child").write_text(str(child.pid))

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(Path("body").read_bytes())

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def answering(body: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Framework:
    """A framework that answers everything with `body`, with a process that leaves its session."""
    monkeypatch.setattr(processes, "ROOT", place)
    (place / "server.py").write_text(SERVER)
    (place / "body").write_text(body)
    return replace(TUTORIAL, command=("server.py", "{port}"))


@pytest.mark.parametrize("body", ["not JSON", '{"other": 1}', "[]"])
def test_an_answer_without_results_is_said(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What answers something else altogether is an error that shows the answer."""
    framework = answering(body, tmp_path, monkeypatch)
    with (
        pytest.raises(processes.FrameworkError, match=re.escape(repr(body.encode()))),
        processes.running(framework, Path(sys.executable), NOTHING, Setting(1, 1, 1)),
    ):
        pass


def require_end(place: Path) -> None:
    """The process that a server of `place` left behind ends."""
    child = Path(f"/proc/{(place / 'child').read_text()}/cmdline")
    deadline = time.monotonic() + 10
    # A killed one is gone, or without a command line until somebody collects it.
    while child.exists() and child.read_bytes():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.01)


def test_no_process_outlives_a_failed_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that left the session of a server which then ended by itself do not stay either."""
    monkeypatch.setattr(processes, "STARTS", 1)
    framework = answering("", tmp_path, monkeypatch)
    (tmp_path / "server.py").write_text(SERVER.partition("class Handler")[0] + "raise SystemExit('no')")
    with (
        pytest.raises(processes.FrameworkError, match="it ended with 1"),
        processes.running(framework, Path(sys.executable), NOTHING, Setting(1, 1, 1)),
    ):
        pass
    require_end(tmp_path)


def test_no_process_outlives_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that left the server's session end with it too, so that they load nobody else's turn."""
    framework = answering('{"lengths": [], "reconstruction_error": 0}', tmp_path, monkeypatch)
    with processes.running(framework, Path(sys.executable), NOTHING, Setting(1, 1, 1)):
        child = Path(f"/proc/{(tmp_path / 'child').read_text()}/cmdline")
        assert b"sleep" in child.read_bytes()
    require_end(tmp_path)
