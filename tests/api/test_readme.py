"""The README's own lines, typed into a shell against the running service."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.mnist import ROOT
from tests.support.process import served

README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
LINES = re.findall(r"^curl .+$", README, flags=re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(ROOT / "models", default_model="mnist", device="cpu") as process:
        yield f"http://127.0.0.1:{process.port}"


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_line(line: str, address: str, tmp_path: Path) -> None:
    """Each curl line of the README works as printed: JSON, or an image in the file that it names."""
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    command = line.replace(ADDRESS, address).replace("curl ", "curl --fail-with-body ", 1)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S602 - the README's own words
    assert done.returncode == 0, done.stdout + done.stderr
    if output := re.search(r"-o (\S+)", line):
        with Image.open(tmp_path / output[1]) as opened:
            assert opened.format == "PNG"
    else:
        assert json.loads(done.stdout)["predictions"][0]["label"] in ("7", "4")


def test_first_answer(address: str) -> None:
    """The answer printed on the README's first screen is the answer that its first line gets."""
    printed = re.search(r"```json\n(.+?)```", README, flags=re.DOTALL)
    assert printed is not None
    command = LINES[0].replace(ADDRESS, address)
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S602 - the README's own words
    shown, found = json.loads(printed[1]), json.loads(done.stdout)
    assert shown["model"] == found["model"]
    (mine,), (theirs,) = shown["predictions"], found["predictions"]
    assert mine.keys() == theirs.keys()
    assert mine["label"] == theirs["label"]
    assert mine["lengths"] == pytest.approx(theirs["lengths"], abs=0.001)
    assert mine["reconstruction_error"] == pytest.approx(theirs["reconstruction_error"], rel=0.01)
