"""When a connection may be kept, and how it is closed without losing what is on its way.

Closing a socket that holds unread data resets it, and the reset can overtake an answer. Therefore an answer
that comes before its request's body is given whole, the rest of the body is thrown away within limits, and
only then the connection is closed.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Connections:
    """ASGI middleware that closes connections after early answers, and all of them while stopping.

    Args:
        stopping: whether the service has been told to stop; clients then have to connect elsewhere.
        body_timeout: seconds that a body may take to arrive, wanted or not.
        max_body: bytes of an unwanted rest that are still read.
    """

    def __init__(
        self, app: ASGIApp, *, stopping: Callable[[], bool], body_timeout: float, max_body: int
    ) -> None:
        self._app = app
        self._stopping = stopping
        self._body_timeout = body_timeout
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline = time.monotonic() + self._body_timeout
        body_outstanding = _has_body(scope["headers"])
        early = unended = False

        async def watched_receive() -> Message:
            nonlocal body_outstanding
            message = await receive()
            if not message.get("more_body"):  # the body's last part, or the client left
                body_outstanding = False
            return message

        async def closing_send(message: Message) -> None:
            nonlocal early, unended
            if message["type"] == "http.response.start":
                early = body_outstanding
                if early or self._stopping():
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif early and not message.get("more_body"):
                unended = True
                message = {**message, "more_body": True}
            await send(message)

        try:
            await self._app(scope, watched_receive, closing_send)
        finally:  # an error of ours is raised again after its answer
            if unended:
                await self._discard_rest(watched_receive, deadline)
                await send({"type": "http.response.body"})

    async def _discard_rest(self, receive: Receive, deadline: float) -> None:
        left = self._max_body
        # The server cancels at the drain limit; the answer has been given all the same.
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(deadline - time.monotonic()):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        return


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            return True
    return False
