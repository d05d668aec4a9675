"""What closes a connection, without a server."""

import asyncio
import contextlib

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.connections import Connections

pytestmark = pytest.mark.anyio


async def sent(headers: list[tuple[bytes, bytes]], error: Exception | None = None) -> list[Message]:
    """The answer of an application that reads no body, to a client that sends none."""
    messages: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"too large"})
        if error is not None:
            raise error

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Message) -> None:
        messages.append(message)

    connections = Connections(app, stopping=lambda: False, body_timeout=0.01, max_body=100)
    with contextlib.suppress(KeyError):
        await connections({"type": "http", "headers": headers}, receive, send)
    return messages


async def test_a_body_of_no_bytes_is_there_already() -> None:
    """Who says that none comes keeps the connection, though the application has not asked for it."""
    start, body = await sent([(b"content-length", b"0")])
    assert start["headers"] == []
    assert not body.get("more_body")


@pytest.mark.parametrize("error", [None, KeyError("ours")])
async def test_an_early_answer_ends_when_the_body_is_given_up(error: Exception | None) -> None:
    """Neither the end of the time for its rest nor an error of ours leaves the answer without its end."""
    start, body, end = await sent([(b"content-length", b"10")], error)
    assert start["headers"] == [(b"connection", b"close")]
    assert body["more_body"]
    assert end == {"type": "http.response.body"}
