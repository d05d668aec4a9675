"""Connections after a refusal: what is read of them, and when."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service import heads
from service.context import REFUSED
from service.heads import TimedHeads

pytestmark = pytest.mark.anyio

LIMIT = 10.0  # seconds
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class App:
    """Answers everything, as a refusal or not; counts what reached it."""

    def __init__(self) -> None:
        self.refusing = True
        self.requests = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        if self.refusing:
            scope["state"][REFUSED] = True
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def served(
    app: App,
) -> AsyncIterator[tuple[uvicorn.Server, asyncio.StreamReader, asyncio.StreamWriter]]:
    http = partial(TimedHeads, head_timeout=LIMIT)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, http=http))  # type: ignore[arg-type] # a factory does
    running = asyncio.create_task(server.serve())
    async with asyncio.timeout(LIMIT):
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        yield server, reader, writer
        writer.close()
        server.should_exit = True
        await running


async def answer(reader: asyncio.StreamReader) -> bytes:
    await reader.readuntil(b"\r\n\r\n")
    return await reader.readexactly(2)


async def test_a_refused_connection_is_read_again_when_its_rest_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a refused client sends at once waits unread until the rest is over, and is answered then."""
    monkeypatch.setattr(heads, "REST", LIMIT)
    app = App()
    async with served(app) as (server, reader, writer):
        writer.write(REQUEST)
        assert await answer(reader) == b"ok"
        app.refusing = False
        writer.write(REQUEST)
        await asyncio.sleep(0.2)
        assert app.requests == 1
        (connection,) = server.server_state.connections
        cast("TimedHeads", connection).read_on()
        assert await answer(reader) == b"ok"
        writer.write(REQUEST)
        assert await answer(reader) == b"ok"  # that one was no refusal: no rest
    assert app.requests == 3


async def test_a_rest_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its rest a connection goes on without anybody's doing."""
    monkeypatch.setattr(heads, "REST", 0.05)
    app = App()
    async with served(app) as (_, reader, writer):
        for _ in range(3):
            writer.write(REQUEST)
            assert await answer(reader) == b"ok"
    assert app.requests == 3


async def test_a_connection_that_does_not_rest_is_not_read_on() -> None:
    """What uvicorn stopped reading, since its application is behind, stays unread at a stop."""
    app = App()
    app.refusing = False
    app.go_on.clear()
    async with served(app) as (server, _, writer):
        writer.write(2 * REQUEST)  # the second waits in the pipeline, and reading stops
        await writer.drain()
        while not app.requests:
            await asyncio.sleep(0.01)
        (connection,) = cast("set[TimedHeads]", server.server_state.connections)
        assert not connection.transport.is_reading()
        connection.read_on()
        assert not connection.transport.is_reading()
        app.go_on.set()
