"""HTTP/1.1 by hand: free to misbehave, and cheap, since the client shares the machine with the service."""

import asyncio
import socket
import struct
import time
from typing import NamedTuple, Self

LIMIT = 60.0  # seconds after which an answer counts as lost

# Well below CAPSNET_KEEP_ALIVE, as for every client: a request that is on its way when it ends is lost.
IDLE = 2.0  # seconds


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def stages(self) -> dict[str, float]:
        """Seconds in each stage, by Server-Timing."""
        entries = [entry.partition(";dur=") for entry in self.headers["server-timing"].split(", ")]
        return {name: float(milliseconds) / 1000 for name, _, milliseconds in entries}


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole request; underscores in the names of headers stand for hyphens."""
    lines = [f"{method} {path} HTTP/1.1", "host: soak", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connection:
    """A kept connection, opened anew when the service has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        return self._streams

    async def send(self, data: bytes) -> None:
        _, writer = await self.open()
        writer.write(data)
        await writer.drain()

    async def receive(self) -> Answer:
        reader, _ = await self.open()
        async with asyncio.timeout(LIMIT):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")[:-2]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            if headers.get("transfer-encoding") == "chunked":
                body = await _chunks(reader)
            elif "content-length" in headers:
                body = await reader.readexactly(int(headers["content-length"]))
            else:
                body = await reader.read()
        if headers.get("connection") == "close":
            self.close()
        return Answer(int(first.split(" ")[1]), headers, body)

    async def exchange(self, data: bytes) -> Answer:
        if time.monotonic() - self._used > IDLE:
            self.close()
        await self.send(data)
        answer = await self.receive()
        self._used = time.monotonic()
        return answer

    def close(self, *, reset: bool = False) -> None:
        if self._streams is None:
            return
        _, writer = self._streams
        self._streams = None
        if reset:  # no farewell: the peer hears of it as of a broken line
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return body
