"""HTTP on a connection as uvicorn speaks it, with limits for request heads and a rest after a refusal."""

import asyncio
from asyncio.events import TimerHandle
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.context import REFUSED
from service.one_write import OneWrite

# After a refusal for overload a connection is read again this much later. A client that waits as it was told
# notices nothing; one that tries again at once costs one refusal a second at most.
REST = 1.0  # seconds, the least that Retry-After says

# As in other servers. Parsed, a head of many short lines takes twenty times its size.
MAX_HEAD = 64 * 1024  # bytes


class TimedHeads(HttpToolsProtocol):
    """Closes a connection whose client does not finish a request's head in time, or sends one without end.

    The time runs from the moment the connection is made, or from the first byte after an answer: until then
    a kept connection has uvicorn's limit. There is no request on such a connection that could be lost.
    """

    def __init__(
        self,
        *arguments: Any,
        head_timeout: float,
        closed: Callable[[], None] = lambda: None,
        **parts: Any,
    ) -> None:
        super().__init__(*arguments, **parts)
        self._head_timeout = head_timeout
        self._closed = closed
        self._limit: TimerHandle | None = None
        self._unread = 0  # bytes since there was last anything for the application: a head, or of a body
        self._rest: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        self.transport = OneWrite(transport, self)  # type: ignore[assignment] # it does all that uvicorn asks of it
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD:
            self.transport.close()  # without a word: what still arrives would destroy it

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        cast("OneWrite", self.transport).flush()
        refused = REFUSED in self.cycle.scope["state"]
        super().on_response_complete()
        if refused and not self.transport.is_closing():
            self.transport.pause_reading()
            self._rest = self.loop.call_later(REST, self.read_on)

    def read_on(self) -> None:
        """End the connection's rest, if it has one."""
        if self._stop_resting() and not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_resting()
        self._unset_keepalive_if_required()  # after a reset uvicorn would keep the connection for that long
        super().connection_lost(exc)
        self._closed()

    def _await_head(self) -> None:
        if self._limit is None:
            self._limit = self.loop.call_later(self._head_timeout, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _stop_resting(self) -> bool:
        rest, self._rest = self._rest, None
        if rest is not None:
            rest.cancel()
        return rest is not None
