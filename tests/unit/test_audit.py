"""What `make audit` says of what pip-audit found."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNKNOWN = "Dependency not found and could not be audited: "
AUDIT = """#!/bin/sh
cp report build/audit.txt
echo "No known vulnerabilities found" >&2
"""


@pytest.mark.parametrize(
    ("unknown", "said"),
    [
        (0, "No known vulnerabilities found\n"),
        (2, "No known vulnerabilities found\naudit: 2 of the 3 pins were not audited: .*\n"),
        (3, "audit: not run: .*\n"),
    ],
)
def test_pins_that_nobody_knows_are_not_called_safe(tmp_path: Path, unknown: int, said: str) -> None:
    """Where pip-audit finds nothing, the pins that it could not ask about are counted, or all not audited."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").write_text("# of one, two and three\none==1\ntwo==2\nthree==3\n")
    names = ("one", "two", "three")[:unknown]
    (tmp_path / "report").write_text("".join(f"{name} {UNKNOWN}{name}\n" for name in names))
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    for file in ("bin/pip", "bin/python", "installed-everything"):
        (environment / file).write_text(AUDIT)
        (environment / file).chmod(0o755)
    told = subprocess.run(
        ["make", "--no-print-directory", "audit", "GPU="],  # noqa: S607 # whichever one a person would get
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.partition("\n")[2]
    assert re.fullmatch(said, told)
