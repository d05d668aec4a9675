"""How connections are shared out and workers replaced, without their processes."""

import asyncio
import contextlib
import logging
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from service import workers
from service.errors import StartError
from service.handover import Notice
from service.listeners import bind, listen
from service.settings import Settings
from service.workers import _MOST_OFFERED, _metrics_folder, _Supervisor, _Worker

pytestmark = pytest.mark.anyio


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[_Supervisor]:
    """One that serves, of whose workers none has started."""
    settings = Settings(models=tmp_path, port=0)
    found = _Supervisor(settings, str(tmp_path), "{}")
    found._listeners = await bind(settings)
    listen(found._listeners)
    found._serving = True
    yield found
    found._watch(False)
    for connection in (*found._listeners, *(one for worker in found._workers for one in worker.offered)):
        connection.close()


@pytest.fixture
def worker(supervisor: _Supervisor) -> Iterator[tuple[_Worker, socket.socket]]:
    """A ready worker of which there is no process, and its end of the channel."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        made = _Worker(cast("asyncio.subprocess.Process", None), ours, ready=True)
        supervisor._workers.append(made)
        yield made, theirs


@contextlib.contextmanager
def clients(supervisor: _Supervisor, count: int) -> Iterator[None]:
    """Connections that nobody has accepted yet."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(supervisor._listeners[0].getsockname(), timeout=10))
        yield


async def offered(worker: _Worker) -> None:
    async with asyncio.timeout(10):
        while not worker.offered:
            await asyncio.sleep(0.01)


async def test_nothing_is_watched_while_no_worker_has_room(
    supervisor: _Supervisor, worker: tuple[_Worker, socket.socket]
) -> None:
    """Connections beyond what a worker may be offered stay with the kernel, and the event loop rests."""
    ours, theirs = worker
    with clients(supervisor, _MOST_OFFERED + 1):
        supervisor._watch(True)
        supervisor._share_out()
        assert (len(ours.offered), supervisor._watching) == (_MOST_OFFERED, False)
        theirs.send(bytes([Notice.TAKEN, Notice.TAKEN]))
        assert supervisor._hear(ours)
        assert (ours.taken, len(ours.offered), supervisor._watching) == (2, _MOST_OFFERED - 1, True)


@pytest.mark.parametrize("step", ["accept", "offer"])
async def test_a_connection_is_handed_over_when_the_system_has_room_again(
    supervisor: _Supervisor,
    worker: tuple[_Worker, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """One that cannot be accepted, or not be offered, is neither lost nor waited for in a busy loop."""
    monkeypatch.setattr(workers, "_RETRY", 0.01)
    refused = []

    def refuse(*_: object) -> None:
        refused.append(step)
        raise OSError(24, "Too many open files")

    supervisor._watch(True)
    with clients(supervisor, 1), monkeypatch.context() as short:
        owner, name = (supervisor, "_accept") if step == "accept" else (workers, "offer")
        short.setattr(owner, name, refuse)
        supervisor._share_out()
        assert (refused, supervisor._watching) == ([step], False)
        short.undo()
        await offered(worker[0])


async def test_a_worker_that_died_has_nothing_more_to_tell(
    supervisor: _Supervisor, worker: tuple[_Worker, socket.socket]
) -> None:
    """Where it died with offers unread, its channel tells an error in place of an end, and is left alone."""
    ours, theirs = worker
    asyncio.get_running_loop().add_reader(ours.channel, supervisor._hear, ours)
    with clients(supervisor, 1):
        supervisor._share_out()
        theirs.close()
        assert not supervisor._hear(ours)
    assert not asyncio.get_running_loop().remove_reader(ours.channel), "it was removed"


async def test_a_worker_tells_why_it_failed(
    supervisor: _Supervisor, worker: tuple[_Worker, socket.socket]
) -> None:
    """The reason is what follows the notice, in its own words."""
    ours, theirs = worker
    theirs.send(bytes([Notice.FAILED]) + "größer".encode())
    assert supervisor._hear(ours)
    assert ours.failure == "größer"


@pytest.mark.parametrize(("old_age", "pauses"), [(60.0, [1, 2, 4, 5, 5]), (-1.0, [0, 0, 0, 0, 0])])
async def test_pauses_grow_for_who_dies_young(
    supervisor: _Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    old_age: float,
    pauses: list[int],
) -> None:
    """Each pause is twice the one before, up to the longest; after a long life there is none."""
    monkeypatch.setattr(workers, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(workers, "_LONGEST_PAUSE", 0.005)
    monkeypatch.setattr(workers, "_OLD_AGE", old_age)
    starts = 0

    async def start(number: int) -> _Worker:
        nonlocal starts
        starts += 1
        if starts > len(pauses):
            supervisor._stopping.set()
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(supervisor, "_start", start)
    with caplog.at_level(logging.ERROR):
        await asyncio.wait_for(supervisor._fill_place(0), 10)
    told = [re.search(r"another starts in ([\d.]+) s$", message) for message in caplog.messages]
    assert [1000 * float(found[1]) for found in told if found] == pauses


async def test_a_stop_does_not_wait_for_a_pause(
    supervisor: _Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of a worker and the start of another the stop begins at once."""
    monkeypatch.setattr(workers, "_FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(workers, "_LONGEST_PAUSE", 3600.0)

    async def start(number: int) -> _Worker:
        asyncio.get_running_loop().call_later(0.1, supervisor._stopping.set)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(supervisor, "_start", start)
    await asyncio.wait_for(supervisor._fill_place(0), 10)


def test_no_room_for_a_folder_to_count_in_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be made, the line says which variable names another."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)

    def refuse(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(StartError, match=r"No space left.*PROMETHEUS_MULTIPROC_DIR"), _metrics_folder():
        pass
