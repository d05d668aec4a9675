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
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.frameworks.contenders import Framework, Setting, Work
from benchmarks.served import DIGIT

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = Path("runs/frameworks")
START_LIMIT = 90.0
STOP_LIMIT = 15.0
STARTS = 3
"""How often one is started that ends before it answers: its error would lose what was measured before."""


class FrameworkError(Exception):
    """A framework that did not install, start, or answer as the graphs do; the message says which."""


class EndedError(FrameworkError):
    """Its process ended before it answered, as some do once in a while."""


def installed(framework: Framework) -> Path:
    """The Python of an environment that has the framework, made where there is none.

    Raises:
        FrameworkError: if it does not install.
    """
    folder = ENVIRONMENTS / framework.folder
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    wanted: list[str] = [*framework.requirements, f"onnxruntime=={version('onnxruntime')}", "numpy", "pillow"]
    if not stamp.exists() or stamp.read_text() != "\n".join(wanted):
        print(f"  installing {framework.name}")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
            done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - fixed words
            if done.returncode:
                said = (done.stdout + done.stderr)[-1000:]
                raise FrameworkError(f"{framework.name} does not install: {said}")
        stamp.write_text("\n".join(wanted))
    return python.absolute()


@contextmanager
def running(framework: Framework, python: Path, work: Work, setting: Setting) -> Iterator[int]:
    """The port of a started server that has answered as the graphs do; ended with all its processes.

    Raises:
        FrameworkError: if it does not, with the end of its log.
    """
    for more in reversed(range(STARTS)):
        with ExitStack() as started:
            try:
                port = started.enter_context(_started(framework, python, work, setting))
            except EndedError as error:
                if not more:
                    raise
                print(f"  it is started again: {error}")
                continue
            yield port
            return


@contextmanager
def _started(framework: Framework, python: Path, work: Work, setting: Setting) -> Iterator[int]:
    """`running`, started once."""
    port = _free_port()
    words = [word.format(port=port, workers=setting.workers) for word in framework.command]
    environment = {
        **os.environ,
        "BENCH_ENCODER": str(work.encoder),
        "BENCH_DECODER": str(work.decoder),
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
            try:
                found = _first_answer(framework, port, process)
                if np.shape(found) != work.expected.shape or not np.allclose(found, work.expected, atol=1e-4):
                    raise FrameworkError(f"it answers {found} instead of {work.expected}")
            except FrameworkError as error:
                log.seek(0)
                said = f"{framework.name} ({setting}): {error}\n{log.read()[-3000:]}"
                raise type(error)(said) from None
            yield port
        finally:
            _end(process, port)


def _first_answer(framework: Framework, port: int, process: subprocess.Popen[bytes]) -> list[float]:
    """The results in the first answer of 200.

    Raises:
        EndedError: the process ends.
        FrameworkError: none comes in time, or it has no results.
    """
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{framework.path}",
        data=json.dumps(framework.body(digit())).encode(),
        headers={"content-type": "application/json"},
    )
    last = "it refuses connections"
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - http
                body = answer.read()
        except urllib.error.HTTPError as error:  # some are 404 until the model is there
            last = f"the last answer was {error.code}, {error.read()[:300]!r}"
        except (OSError, HTTPException) as error:  # not there yet
            last = f"the last try ended with {error!r}"
        else:
            try:
                return framework.results(json.loads(body))
            except (ValueError, LookupError, TypeError) as error:
                raise FrameworkError(f"it answers {body[:300]!r}, where there are no results") from error
        time.sleep(0.2)
    if process.poll() is not None:
        raise EndedError(f"it ended with {process.returncode}")
    raise FrameworkError(f"it has no answer of 200 in {START_LIMIT:g} s; {last}")


def _end(process: subprocess.Popen[bytes], port: int) -> None:
    """Ask its processes to end, and after a while make them, with those that left its session."""
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
    for left in _told_of(port):
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def _told_of(port: int) -> list[int]:
    """Processes that were started with this port in their environment, whoever their parent is by now."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile, or is somebody else's
            if f"BENCH_PORT={port}".encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def digit() -> str:
    return base64.b64encode(DIGIT.read_bytes()).decode()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
