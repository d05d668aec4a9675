"""What checks CUDA does all of it on a CPU too, and says in one sentence why it cannot be done on CUDA."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from benchmarks import __main__ as command
from benchmarks import cuda, report, timing
from tests.support.mnist import ROOT

MODEL = command.newest(ROOT / "models" / "mnist")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "TURN", 0)
        return cuda.run(MODEL, 0, max_batch=3, device="cpu", offline=(2,))


def test_every_form_is_checked_and_measured(measured: dict[str, Any], tmp_path: Path) -> None:
    """Differences, nodes and memory of each form, its speed at each bucket; nothing fails."""
    assert measured["forms"].keys() == cuda.FORMS.keys()
    for form in measured["forms"].values():
        assert 0 <= form["difference"] <= form["tolerance"]
        assert form["nodes"]["CPUExecutionProvider"] > 20
    assert measured["forms"]["fp16"]["difference"] > 0, "on a CPU too, half precision is another arithmetic"
    assert [row["batch"] for row in measured["rows"]] == [1, 2, 3]
    assert cuda.failures(measured) == []
    report.write({"cuda": measured}, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| batch | fp32 | fp32, CUDA graphs |" in text
    assert "| fp16, CUDA graphs | " in text


def test_what_is_no_number_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One NaN in one batch size is found, whatever the others give."""
    monkeypatch.setattr(timing, "TURN", 0)
    answers = iter([(0.0, 0.0, 0.0), (0.0, float("nan"), 0.0), (0.0, 0.0, float("nan"))])
    monkeypatch.setattr(cuda, "FORMS", {"fp32": cuda.FORMS["fp32"]})
    monkeypatch.setattr(cuda, "_differences", lambda *_: next(answers))
    found = cuda.failures(cuda.run(MODEL, 0, max_batch=3, device="cpu", offline=(2,)))
    assert [sentence.split()[1] for sentence in found] == ["differs", "draws"]


def test_what_is_wrong_is_said() -> None:
    """A difference beyond the tolerance, NaN too, a drawing that differs, more memory, nodes on the CPU."""
    good = {
        "difference": 1e-5,
        "tolerance": 1e-4,
        "drawing": 0.004,
        "memory_stays": True,
        "memory_mib": {},
        "nodes": {"CUDA": 9},
    }
    assert cuda.failures({"forms": {"fp32": good}}) == []
    for change, said in (
        ({"difference": 2e-4}, "differs from fp32 on the CPU by 0.0002, expected at most 0.0001"),
        ({"difference": float("nan")}, "differs from fp32 on the CPU by nan"),
        ({"drawing": 0.012}, "draws up to 3.1 levels apart from fp32 on the CPU"),
        ({"memory_stays": False}, "took more memory after the warm-up"),
        ({"nodes": {"CUDA": 9, "CPUExecutionProvider": 2}}, "runs 2 nodes of the encoder on the CPU"),
    ):
        (sentence,) = cuda.failures({"forms": {"fp32": good | change}})
        assert sentence.startswith("fp32 ")
        assert said in sentence


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_without_cuda_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what is missing; nothing is written."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        command.main(["cuda", "--output", str(tmp_path / "results")])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("cuda was not measured: this ONNX Runtime has no CUDA provider")
    assert said.count("\n") == 1
    assert not (tmp_path / "results").exists()
