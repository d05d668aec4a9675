"""An answer's head and the first part of its body in one write.

Uvicorn writes them one after the other, and uvloop hands each to the system at once: two system calls, and a
client that is woken for the head alone.
"""

import asyncio
import weakref
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class Answering(Protocol):
    """A connection's protocol."""

    running: RequestResponseCycle | None  # the request that is answered


class OneWrite:
    """A transport that keeps an answer's head back until the next write.

    The application must go on with the body soon: until then the client sees nothing of the answer.

    Args:
        transport: everything else is its doing.
        protocol: its running request says whether a write is a head.
    """

    def __init__(self, transport: asyncio.Transport, protocol: Answering) -> None:
        self._transport = transport
        self.is_closing = transport.is_closing  # asked for each answer
        self._protocol = weakref.proxy(protocol)  # which holds this transport
        self._head = b""
        self._answered: RequestResponseCycle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        cycle = self._protocol.running
        # Before an answer has begun come "100 Continue", and the refusal of what is no HTTP.
        if cycle is not self._answered and cycle is not None and cycle.response_started:
            self._answered = cycle
            self._head = data
            return
        self._transport.write(self._head + data)
        self._head = b""

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Write a head that no body follows."""
        if self._head:
            self._transport.write(self._head)
            self._head = b""
