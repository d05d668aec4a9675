"""What is pinned in two places is pinned to the same version."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_builds_use_the_pinned_backend() -> None:
    """pip's environment for a build has exactly the backend that every other environment has."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert wanted == [pin for pin in pins if pin.startswith("setuptools==")]
