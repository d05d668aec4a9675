"""A worker's end of the channel, in this process."""

import asyncio
import socket
from collections.abc import Callable, Iterator

import pytest

from service.handover import Inbox, Notice, offer

pytestmark = pytest.mark.anyio


class Worker:
    """Keeps what it is offered, and knows whether it was told that it is alone."""

    def __init__(self, channel: socket.socket) -> None:
        self.connections: list[socket.socket] = []
        self.orphaned = False
        self.inbox = Inbox(channel, self._serve, self._orphan)

    async def _serve(self, connection: socket.socket, closed: Callable[[], None]) -> None:
        self.connections.append(connection)
        closed()

    def _orphan(self) -> None:
        self.orphaned = True


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The end of the process that accepts, which never waits, and the worker's."""
    accepting, working = socket.socketpair()
    with accepting, working:
        accepting.setblocking(False)
        working.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little as the system can do with
        yield accepting, working


async def notices(accepting: socket.socket, count: int) -> list[Notice]:
    found = b""
    async with asyncio.timeout(10):
        while len(found) < count:
            found += await asyncio.get_running_loop().sock_recv(accepting, 65536)
    return [Notice(told) for told in found]


async def test_a_connection_is_taken_and_its_end_is_told(
    channel: tuple[socket.socket, socket.socket],
) -> None:
    """What the worker gets is the connection that was offered, and an event loop may have it."""
    accepting, working = channel
    worker = Worker(working)
    client, connection = socket.socketpair()
    with client, connection:
        offer(accepting, connection)
        assert await notices(accepting, 2) == [Notice.TAKEN, Notice.CLOSED]
        (taken,) = worker.connections
        with taken:
            assert not taken.getblocking()
            client.sendall(b"request")
            assert taken.recv(100) == b"request"


async def test_a_connection_that_is_lost_on_the_way_is_not_counted(
    channel: tuple[socket.socket, socket.socket],
) -> None:
    """A worker that may open no more files gets the offer without its connection, and tells its end."""
    accepting, working = channel
    worker = Worker(working)
    accepting.send(b"\0")
    assert await notices(accepting, 2) == [Notice.TAKEN, Notice.CLOSED]
    assert worker.connections == []


async def test_no_notice_is_lost_while_the_channel_is_full(
    channel: tuple[socket.socket, socket.socket],
) -> None:
    """What finds no room is sent when the other process has read, in the same order."""
    accepting, working = channel
    worker = Worker(working)
    told = [Notice.READY, *[Notice.TAKEN, Notice.CLOSED] * 5_000]
    for notice in told:
        worker.inbox.tell(notice)
    assert await notices(accepting, len(told)) == told


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("leaving", [False, True])
async def test_the_other_processs_end_is_the_last_offer(
    channel: tuple[socket.socket, socket.socket], unread: bool, leaving: bool
) -> None:
    """When it ends, whatever it has left unread, a worker knows that it is alone unless it leaves already."""
    accepting, working = channel
    worker = Worker(working)
    if unread or leaving:
        worker.inbox.tell(Notice.LEAVING if leaving else Notice.READY)
    if not unread and leaving:
        assert await notices(accepting, 1) == [Notice.LEAVING]
    accepting.close()
    await asyncio.wait_for(worker.inbox.ended.wait(), 10)
    assert worker.orphaned != leaving
    worker.inbox.tell(Notice.CLOSED)  # which nobody hears
    assert not asyncio.get_running_loop().remove_writer(working), "it is not tried again for ever"
