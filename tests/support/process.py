"""The service as a process of its own, as people run it."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from tests.support.encoded import encode, png_bomb
from tests.support.status import status_of
from tests.support.tiny_model import image_of

PNG = encode(image_of(3))
IMAGE = {"content-type": "image/png"}
LIMIT = 10.0  # seconds: a container's runtime kills what takes longer to stop
START_LIMIT = 60.0  # seconds, on a machine that has much else to do

# A service in which decoding a large image takes half a minute.
HANGING = """
import sys, time
from service import decoding
from service.main import main

def prepare(*arguments):
    print("decoding", file=sys.stderr, flush=True)
    time.sleep(30)

decoding.prepare = prepare
sys.exit(main())
"""


class Served:
    """A started process and its address."""

    def __init__(self, process: subprocess.Popen[str], log: list[str], port: int) -> None:
        self.process = process
        self.log = log
        self.port = port
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT)

    @property
    def grpc_address(self) -> str:
        """Where it serves gRPC, which its settings must ask for."""
        found = re.search(r"over gRPC on (127\.0\.0\.1:\d+)", "".join(self.log))
        assert found is not None, "no gRPC server was started:\n" + "".join(self.log)
        return found[1]

    def predict(self) -> str:
        answer = self.client.post("/predict", content=PNG, headers=IMAGE)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["predictions"][0]["label"])

    def memory(self) -> int:
        """Bytes that are resident."""
        return 1024 * status_of(self.process.pid, "VmRSS")

    def peak_memory(self) -> int:
        """Bytes that were resident at most."""
        return 1024 * status_of(self.process.pid, "VmHWM")

    def refuses_connections(self) -> None:
        """Return when the process accepts no more connections."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT).close()
            except ConnectionError:  # refused, or reset where the socket closed in between
                return
        raise AssertionError("the process still accepts connections")


def environment(models: Path, **settings: str) -> dict[str, str]:
    names = {f"CAPSNET_{name.upper()}": value for name, value in settings.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CAPSNET_")}
    return {**kept, "CAPSNET_MODELS": str(models), "CAPSNET_DEFAULT_MODEL": "tiny", **names}


def alone(models: Path, place: Path) -> Path:
    """The model in `models` that answers when a request names none, linked into `place` by itself."""
    versions = min(path for path in models.iterdir() if path.is_dir()).iterdir()
    newest = max(versions, key=lambda path: int(path.name))
    link = place / newest.parent.name / newest.name
    link.parent.mkdir(parents=True)
    link.symlink_to(newest.resolve())
    return link


@contextmanager
def served(
    models: Path, *, program: Sequence[str] = ("-m", "service.main"), **settings: str
) -> Iterator[Served]:
    process = subprocess.Popen(  # noqa: S603 - fixed words
        [sys.executable, *program, "--port", "0"],
        env=environment(models, **settings),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    log: list[str] = []
    drain = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
    try:
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"serving on http://127\.0\.0\.1:(\d+) \((?:cpu|cuda|\d+ workers)\)", line):
                break
        else:
            raise AssertionError("the process did not start:\n" + "".join(log))
        drain.start()
        service = Served(process, log, int(found[1]))
        with service.client:
            yield service
    finally:
        process.kill()
        process.wait()
        if drain.ident is not None:  # a process that did not start has said all it will
            drain.join(LIMIT)
        process.stderr.close()


@contextmanager
def connected(service: Served) -> Iterator[socket.socket]:
    """A bare connection to the service, for what no HTTP client would send."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=LIMIT) as connection:
        yield connection


def until_closed(connection: socket.socket) -> bytes:
    """The rest of what comes until the other side closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def until(true: Callable[[], bool], limit: float = LIMIT) -> None:
    """Wait until something is so, for `limit` seconds at most."""
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def hang(service: Served, connection: socket.socket) -> None:
    """Have a service with `HANGING` for its program decode an image."""
    large = png_bomb(300, 300)
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(large)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + large)
    until(lambda: "decoding\n" in service.log)
