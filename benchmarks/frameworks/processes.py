"""A framework's environment and its processes, from the start to the end of the last of them."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.frameworks.contenders import Framework, Setting
from benchmarks.served import DIGIT

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = Path("runs/frameworks")
START_LIMIT = 90.0
STOP_LIMIT = 15.0


class FrameworkError(Exception):
    """A framework that did not install, start, or answer as the graph does; the message says which."""


def installed(framework: Framework) -> Path:
    """The Python of an environment that has the framework, made where there is none.

    Raises:
        FrameworkError: if it does not install.
    """
    folder = ENVIRONMENTS / framework.packaged_as
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    wanted: list[str] = [*framework.requirements, f"onnxruntime=={version('onnxruntime')}", "numpy", "pillow"]
    if not stamp.exists() or stamp.read_text() != "\n".join(wanted):
        print(f"  installing {framework.name}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)  # noqa: S603 - fixed words
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - the same
        if done.returncode:
            raise FrameworkError(f"{framework.name} does not install: {done.stderr[-1000:]}")
        stamp.write_text("\n".join(wanted))
    return python.absolute()


@contextmanager
def running(
    framework: Framework, python: Path, encoder: Path, setting: Setting, expected: NDArray[np.float32]
) -> Iterator[int]:
    """The port of a started server that has answered as the graph does; ended with all its processes."""
    port = _free_port()
    words = [word.format(port=port, workers=setting.workers) for word in framework.command]
    environment = {
        **os.environ,
        "BENCH_ENCODER": str(encoder),
        "BENCH_PORT": str(port),
        "BENCH_THREADS": str(setting.threads),
        "BENCH_WORKERS": str(setting.workers),
        "BENCH_WAIT_MS": str(setting.wait_ms or 0),
        "PYTHONPATH": str(ROOT),
        # Triton's Python processes load the first libpython of this version that they find.
        "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(  # noqa: S603 - fixed words
            [python, *words], env=environment, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
        )
        try:
            found = _first_answer(framework, port, process)
            if found is None or not np.allclose(found, expected, atol=1e-4):
                log.seek(0)
                said = "answers nothing" if found is None else f"answers {found} instead of {expected}"
                raise FrameworkError(f"{framework.name} ({setting}) {said}:\n{log.read()[-3000:]}")
            yield port
        finally:
            _end(process)


def _first_answer(framework: Framework, port: int, process: subprocess.Popen[bytes]) -> list[float] | None:
    """The lengths in the first answer of 200; None if the process ends, or none comes in time."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{framework.path}",
        data=json.dumps(framework.body(digit())).encode(),
        headers={"content-type": "application/json"},
    )
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - http
                return framework.lengths(json.load(answer))
        except OSError:  # not there yet, or not ready
            time.sleep(0.2)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask its processes to end, and after a while make them."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def digit() -> str:
    return base64.b64encode(DIGIT.read_bytes()).decode()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
