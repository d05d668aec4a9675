"""Other frameworks are asked the same as ours, and only what answers rightly is measured."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.frameworks import comparison, processes
from benchmarks.frameworks.contenders import FRAMEWORKS, Setting
from tests.support.mnist import ROOT

MODEL = command.newest(ROOT / "models" / "mnist")
TUTORIAL = FRAMEWORKS[0]
"""It needs nothing that this environment lacks."""


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_the_tutorial_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are loaded in each round, and the table has the answers of each as a share of ours."""
    monkeypatch.setattr(comparison, "CONCURRENCIES", (1, 32, 64))
    monkeypatch.setattr(comparison, "installed", lambda _: Path(sys.executable))
    measured = comparison.run(MODEL, 1, threads=1, rounds=1, frameworks=(TUTORIAL,))
    assert set(measured["rows"]) == {comparison.OURS, TUTORIAL.name}
    assert all(row["rate_32"] > 0 and row["p99_64"] > 0 for row in measured["rows"].values())
    assert measured["chosen"][TUTORIAL.name]["setting"] == "1 x 1 threads"
    report.write({"frameworks": {"machine": "a test", **measured}}, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| **this service** |" in text
    assert f"| {TUTORIAL.name} 0.165.0 (1 x 1 threads) |" in text


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
    ("path", "said"), [("/predict", r"answers \[.*\] instead of \[9"), ("/absent", "answers nothing")]
)
def test_what_answers_otherwise_is_not_measured(
    path: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A framework whose lengths are not the graph's, or that gives none, is an error that shows its log."""
    monkeypatch.setattr(processes, "START_LIMIT", 5)
    encoder, nine = MODEL / "encoder.onnx", np.full(10, 9.0, "f4")
    framework = replace(TUTORIAL, path=path)
    with (
        pytest.raises(processes.FrameworkError, match=rf"(?s){said}.*Uvicorn running"),
        processes.running(framework, Path(sys.executable), encoder, Setting(1, 1, 1), nine),
    ):
        pass


def test_what_ends_at_once_is_said() -> None:
    """A framework that does not start is an error at once, with what it said."""
    framework = replace(TUTORIAL, command=("-c", "raise SystemExit('no room')"))
    with (
        pytest.raises(processes.FrameworkError, match=r"(?s)answers nothing.*no room"),
        processes.running(framework, Path(sys.executable), MODEL, Setting(1, 1, 1), np.zeros(10, "f4")),
    ):
        pass
