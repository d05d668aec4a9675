"""Answers as they leave: head and body together, and nothing kept back that nobody would send."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.one_write import OneWrite


class Wire:
    """A transport that keeps what is written, each write by itself."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed_after: int | None = None

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed_after = len(self.writes)

    def is_closing(self) -> bool:
        return self.closed_after is not None


class Protocol:
    """Has the request that is answered."""

    def __init__(self) -> None:
        self.running: RequestResponseCycle | None = None

    def begin(self) -> None:
        self.running = cast("RequestResponseCycle", SimpleNamespace(response_started=False))

    def answer(self) -> None:
        assert self.running is not None
        self.running.response_started = True


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def protocol() -> Protocol:
    return Protocol()


@pytest.fixture
def transport(wire: Wire, protocol: Protocol) -> OneWrite:
    return OneWrite(cast("asyncio.Transport", wire), protocol)


def test_a_head_leaves_with_its_body(wire: Wire, protocol: Protocol, transport: OneWrite) -> None:
    """Each answer of a kept connection is one write."""
    for _ in range(2):
        protocol.begin()
        protocol.answer()
        transport.write(b"head")
        assert wire.writes[-1:] != [b"head"]
        transport.write(b"body")
    assert wire.writes == [b"headbody", b"headbody"]


def test_later_parts_of_a_body_are_not_kept_back(wire: Wire, protocol: Protocol, transport: OneWrite) -> None:
    """After the first part every part leaves at once."""
    protocol.begin()
    protocol.answer()
    for part in (b"head", b"first", b"second", b"third"):
        transport.write(part)
    assert wire.writes == [b"headfirst", b"second", b"third"]


@pytest.mark.parametrize("begin", [lambda _: None, Protocol.begin], ids=["no request", "a request"])
def test_what_comes_before_an_answer_leaves_at_once(
    begin: Callable[[Protocol], None], wire: Wire, protocol: Protocol, transport: OneWrite
) -> None:
    """ "100 Continue", and the refusal of what is no HTTP, are not kept back."""
    begin(protocol)
    transport.write(b"at once")
    assert wire.writes == [b"at once"]


@pytest.mark.parametrize("end", [OneWrite.flush, OneWrite.close], ids=["flush", "close"])
def test_a_head_without_a_body_leaves_at_the_answers_end(
    end: Callable[[OneWrite], None], wire: Wire, protocol: Protocol, transport: OneWrite
) -> None:
    """What no body follows is written when the answer is complete, and before the connection closes."""
    protocol.begin()
    protocol.answer()
    transport.write(b"head")
    end(transport)
    end(transport)
    assert wire.writes == [b"head"]
    assert wire.closed_after == (1 if end is OneWrite.close else None)


def test_everything_else_is_the_transports(wire: Wire, transport: OneWrite) -> None:
    """What is asked of the transport besides writing, it answers itself."""
    assert not transport.is_closing()
    wire.close()
    assert transport.is_closing()
