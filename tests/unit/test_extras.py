"""What the commands say where the extra that they need is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "missing", "says"),
    [
        (
            "service.main",
            "onnxruntime",
            "capsnet-serve: onnxruntime is not installed; install the extra `cpu` or `gpu`\n",
        ),
        (
            "training.main",
            "torch",
            "capsnet: torch is not installed; install the extras `train`, and `cpu` or `gpu`\n",
        ),
    ],
    ids=["service", "training"],
)
def test_a_missing_extra_is_named_in_one_line(command: str, missing: str, says: str) -> None:
    """Neither command ends in a stack where it was installed without what it needs."""
    program = f"import sys; sys.modules[{missing!r}] = None; from {command} import main; sys.exit(main())"
    ended = subprocess.run(  # noqa: S603 # our own interpreter
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (1, says)


def test_a_part_of_ours_that_is_missing_is_no_extra() -> None:
    """It is a fault of ours, whose stack is shown."""
    program = "import sys; sys.modules['training.losses'] = None; from training.main import main; main()"
    ended = subprocess.run(  # noqa: S603 # our own interpreter
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "extra" not in ended.stderr
