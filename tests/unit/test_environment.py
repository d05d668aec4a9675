"""What the tests take from the environment of whoever runs them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import tests.conftest
print(*(name for name in os.environ if name.upper().startswith("CAPSNET_")))
"""


def test_settings_of_whoever_runs_the_tests_do_not_reach_them() -> None:
    """Only the folder of the data sets is left of the variables that people set for the service."""
    given = {"CAPSNET_MAX_BATCH": "300", "capsnet_api_keys": "a key of sixteen", "CAPSNET_DATA_DIR": "data"}
    printed = subprocess.run(  # noqa: S603 # our own interpreter
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **given},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.split() == ["CAPSNET_DATA_DIR"]
