"""The least that a service on uvicorn can do, as a ceiling of ours: decode, batch, run, answer.

No limits, no checks of anything, no other forms of requests, no reconstruction, no figures, no drain.
"""

import asyncio
import contextlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvicorn
from numpy.typing import NDArray
from PIL import Image

from benchmarks.frameworks.classifier import opened

_START_LIMIT = 30.0  # seconds
_MAX_BATCH = 64  # as our service's


class _Batches:
    """As our batcher does with many callers: half of those who wait and were just answered run together."""

    def __init__(self) -> None:
        self._encoder = opened("BENCH_ENCODER")
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._waiting: list[tuple[NDArray[np.uint8], asyncio.Future[NDArray[np.float32]]]] = []
        threading.Thread(target=self._work, daemon=True).start()

    async def lengths(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(H, W) -> (K,)."""
        found: asyncio.Future[NDArray[np.float32]] = self._loop.create_future()
        with self._changed:
            self._waiting.append((image, found))
            self._changed.notify()
        return await found

    def _work(self) -> None:
        answered = 0
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                count = min(len(self._waiting), -(-(len(self._waiting) + answered) // 2), _MAX_BATCH)
                batch, self._waiting = self._waiting[:count], self._waiting[count:]
            images = np.stack([image for image, _ in batch])
            (found,) = self._encoder.run(["capsule_lengths"], {"images": images})
            answered = count
            self._loop.call_soon_threadsafe(self._deliver, [waiting for _, waiting in batch], found)

    @staticmethod
    def _deliver(waiting: list[asyncio.Future[NDArray[np.float32]]], found: NDArray[np.float32]) -> None:
        for future, row in zip(waiting, found, strict=True):
            if not future.done():  # its caller has left
                future.set_result(row)


class _Application:
    def __init__(self) -> None:
        self._batches = _Batches()

    async def __call__(self, _: object, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        image = np.asarray(Image.open(io.BytesIO(body)).convert("L"))
        lengths = await self._batches.lengths(image)
        text = orjson.dumps({"class": int(lengths.argmax()), "lengths": lengths.tolist()})
        length = b"%d" % len(text)
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})


@contextlib.contextmanager
def serving(encoder: Path, threads: int) -> Iterator[int]:
    """The port where the least service runs `encoder`, in a process of its own.

    Raises:
        RuntimeError: it did not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.least", str(port)]
    environment = {**os.environ, "BENCH_ENCODER": str(encoder), "BENCH_THREADS": str(threads)}
    with subprocess.Popen(command, env=environment) as process:  # noqa: S603 - fixed words
        try:
            _wait_for(port, process)
            yield port
        finally:
            process.kill()  # it has nothing to lose


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_LIMIT
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise RuntimeError("the least service does not start")


async def _serve(port: int) -> None:
    config = uvicorn.Config(
        _Application(),
        port=port,
        interface="asgi3",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        runner.run(_serve(int(sys.argv[1])))
