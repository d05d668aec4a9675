"""HTTP on a connection as uvicorn speaks it, with limits for request heads and for answers that nobody takes,
and a rest after a refusal.
"""

import asyncio
from asyncio.events import TimerHandle
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.context import REFUSED, WHOLE
from service.errors import Overloaded
from service.one_write import OneWrite
from service.refusals import RefusalLog
from service.room import Room, Share

# After a refusal for overload a connection is read again this much later. A client that waits as it was told
# notices nothing; one that tries again at once costs one refusal a second at most.
REST = 1.0  # seconds, the least that Retry-After says

# As in other servers. Parsed, a head of many short lines takes twenty times its size.
MAX_HEAD = 64 * 1024  # bytes
MAX_LINES = 100  # of a head, or behind a body: as many as Apache takes

# Requests that were sent in one go and wait for the answer to the one before. What is read at once may have
# thousands, and each takes a kilobyte.
MAX_WAITING = 32

_log_seldom = RefusalLog().log_seldom
_log_malformed = RefusalLog().log_seldom


class _Unacceptable(Exception):
    """A head that says what this server does not take."""


class _TooManyWait(Exception):
    """One request more than may wait."""


class _Parser(httptools.HttpRequestParser):
    """Reads each request as if it offered no other protocol, which a server may do (RFC 9110, 7.8).

    Where one is offered, httptools takes what follows the head for that protocol, and not for the body.
    """

    def __init__(self, protocol: "LimitedProtocol") -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._protocol = protocol

    def feed_data(self, data: Any) -> None:  # bytes or a view of them
        parser = self
        while True:
            try:
                super(_Parser, parser).feed_data(data)
                return
            except httptools.HttpParserUpgrade as offered:
                if parser.get_method() == b"CONNECT":
                    raise
                data = memoryview(data)[offered.args[0] :]
            head = self._protocol.head_without_offer()
            # A new one, because after a connection's last request the old one reads nothing.
            parser = self._protocol.parser = _Parser(self._protocol)
            super(_Parser, parser).feed_data(head)


class LimitedProtocol(HttpToolsProtocol):
    """Closes a connection whose client does not finish a request's head in time, or sends one without end, or
    does not take an answer.

    The time for a head runs from the moment the connection is made, or from the first byte after an answer:
    until then a kept connection has uvicorn's limit. There is no request on such a connection that could be
    lost. That for an answer runs while the system has no room for the rest of it.

    Args:
        head_timeout: seconds for a request's head to arrive.
        answer_timeout: seconds for a client to take an answer.
        answer_room: what all connections together hold of answers that are not taken yet.
        malformed: called for what is no request, which therefore reaches no application.
        closed: called at the connection's end.
    """

    def __init__(
        self,
        *arguments: Any,
        head_timeout: float,
        answer_timeout: float,
        answer_room: Room,
        malformed: Callable[[], None],
        closed: Callable[[], None] = lambda: None,
        **parts: Any,
    ) -> None:
        super().__init__(*arguments, **parts)
        self.parser = _Parser(self)
        self._head_timeout = head_timeout
        self._answer_timeout = answer_timeout
        self._answer_room = answer_room
        self._malformed = malformed
        self._closed = closed
        self._limit: TimerHandle | None = None
        self._unread = 0  # bytes since there was last anything for the application: a head, or of a body
        self._rest: TimerHandle | None = None
        self._untaken = Share(answer_room)
        self._taking: TimerHandle | None = None
        self._behind = False  # an answer is complete, but not taken
        self.running: RequestResponseCycle | None = None  # that is answered, where `cycle` is the newest
        self._is_last = False  # the connection ends with the answers to what has been read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # hear of every byte that the system does not take at once
        self.transport = OneWrite(transport, self)  # type: ignore[assignment] # it does all that uvicorn asks of it
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._is_last:
            return
        self._unread += len(data)
        self._unset_keepalive_if_required()
        # Not uvicorn's own, which logs a line for each that is no request, and two for CONNECT.
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the application refuses the method
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _TooManyWait):
                self._end_after(self.cycle)
            else:
                self._refuse(error.__context__)
        if self._unread > MAX_HEAD and not self._is_last:
            self.transport.close()  # without a word: what still arrives would destroy it
        elif self.cycle is None or self.cycle.response_complete:  # else the head came whole, as nearly all do
            self._await_head()

    def _refuse(self, reason: BaseException | None) -> None:
        client = self.client[0] if self.client else "somebody"
        _log_malformed(f"{client} sent what cannot be read as an HTTP request")
        broken = self.cycle if self.cycle is not None and self.cycle.more_body else None
        if broken is None:  # otherwise it is part of a request, which counts
            self._malformed()
        elif self.pipeline:
            self.pipeline.popleft()  # that one, which nobody has begun
        if self.pipeline:
            self._end_after(self.pipeline[0][0])
        elif self.running is None or self.running.response_complete:
            self._send_refusal(reason)
        elif broken is not self.running:
            self._end_after(self.running)
        elif self.running.response_started:
            self.transport.close()  # in the midst of its answer
        else:
            self._send_refusal(reason)

    def _send_refusal(self, reason: BaseException | None) -> None:
        detail = f" {reason}" if isinstance(reason, _Unacceptable) else ""
        self.send_400_response(f"Invalid HTTP request received.{detail}")

    def _end_after(self, last: RequestResponseCycle) -> None:
        """Close the connection once this request is answered, as its answer says, and heed nothing more.

        What follows was not begun: its client may send it again (RFC 9112, 9.3.2). It is read all the same,
        since at the end bytes that nobody has read would destroy the answers on their way.
        """
        last.keep_alive = False
        self._is_last = True

    def head_without_offer(self) -> bytes:
        """The head that was read last, without the header that offers another protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join((*lines, b"", b""))

    # As uvicorn's, without the blanks that may stand behind a value and are no part of it (RFC 9110, 5.5).
    # Every header comes by here, so that one is not called.
    def on_header(self, name: bytes, value: bytes) -> None:
        name, value = name.lower(), value.rstrip(b" \t")
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        elif name == b"transfer-encoding" and value.lower() != b"chunked":
            raise _Unacceptable("The only transfer coding that is taken is: chunked.")
        if len(self.headers) == MAX_LINES:
            raise _Unacceptable(f"A head may have {MAX_LINES} lines.")
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._is_offer():
            return
        if len(self.pipeline) == MAX_WAITING:
            raise _TooManyWait
        self._unread = 0
        self._stop_waiting()
        super().on_headers_complete()
        self.headers = []  # behind the body come trailers, which are none of the request's (RFC 9110, 6.5.1)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_offer():
            super().on_message_complete()
            self.cycle.scope["state"][WHOLE] = True

    def _is_offer(self) -> bool:
        """Whether the head in hand is read a second time, by `_Parser`."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def on_response_complete(self) -> None:
        cast("OneWrite", self.transport).flush()
        if self.flow.write_paused and not self.transport.is_closing():
            # The answer to a next request would be held beside this one, and not be counted.
            self._behind = True
            self.flow.pause_reading()
        else:
            self._go_on()

    def pause_writing(self) -> None:
        super().pause_writing()
        # One that is larger than the room may be there alone.
        size = min(self.transport.get_write_buffer_size(), self._answer_room.size)
        try:
            self._untaken.resize(size)
        except Overloaded as error:
            self._cut(error.detail)
        else:
            limit = self._answer_timeout
            reason = f"its client did not take an answer within {limit:g} s"
            self._taking = self.loop.call_later(limit, self._cut, reason)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_taking()
        if self._behind:
            self._go_on()

    def _go_on(self) -> None:
        """To the next request."""
        self._behind = False
        refused = REFUSED in cast("RequestResponseCycle", self.running).scope["state"]
        super().on_response_complete()
        if self.pipeline and not self._is_last:  # uvicorn reads on; what has been read is enough for now
            self.flow.pause_reading()
        if refused and not self.transport.is_closing():
            self.transport.pause_reading()
            self._rest = self.loop.call_later(REST, self.read_on)

    def read_on(self) -> None:
        """End the connection's rest, and its wait for an answer to be taken, if it has one."""
        if self._behind:
            self._go_on()
        if self._stop_resting() and not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_resting()
        self._stop_taking()
        self._unset_keepalive_if_required()  # after a reset uvicorn would keep the connection for that long
        if self.running is not None and not self.running.response_complete:
            # Uvicorn tells the newest, which may be another one.
            self.running.disconnected = True
            self.running.message_event.set()
        super().connection_lost(exc)
        self._closed()

    def _await_head(self) -> None:
        if self._limit is None:
            self._limit = self.loop.call_later(self._head_timeout, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _stop_taking(self) -> None:
        self._untaken.resize(0)
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _cut(self, reason: str) -> None:
        _log_seldom(f"a connection is cut: {reason}")
        self.transport.abort()

    def _stop_resting(self) -> bool:
        rest, self._rest = self._rest, None
        if rest is not None:
            rest.cancel()
        return rest is not None
