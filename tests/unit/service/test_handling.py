"""Answers in time: the limit, a caller who leaves, and whoever cancels from outside."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from starlette.datastructures import State

from service.errors import TimedOut
from service.handling import answer_in_time
from service.problems import ClientGone

pytestmark = pytest.mark.anyio

LIMIT = 0.2  # seconds: longer than a caller goes unwatched
HANGS = 10.0  # seconds after which a test that hangs has failed


async def for_ever() -> Any:
    await asyncio.Event().wait()


def request(receive: Callable[[], Awaitable[Any]] = for_ever) -> Request:
    """Of a service with the limit, whose server reports what `receive` says."""
    service = SimpleNamespace(settings=SimpleNamespace(request_timeout=LIMIT))
    app = SimpleNamespace(state=State({"service": service}))
    return Request({"type": "http", "app": app}, receive)


async def test_work_in_time_is_answered() -> None:
    """What the work returns is returned, though the caller was watched, who is cancelled no more after it."""

    async def work() -> str:
        await asyncio.sleep(LIMIT / 2)
        return "done"

    assert await answer_in_time(request(), work()) == "done"
    await asyncio.sleep(LIMIT)


async def test_the_limit_holds_when_the_caller_is_watched() -> None:
    """Work that takes too long ends at the limit, and not before."""
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(HANGS):
        with pytest.raises(TimedOut):
            await answer_in_time(request(), for_ever())
    assert asyncio.get_running_loop().time() - began >= LIMIT


async def test_a_caller_who_leaves_ends_the_work() -> None:
    """A disconnect ends what nobody waits for."""

    async def leaves() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async with asyncio.timeout(HANGS):
        with pytest.raises(ClientGone):
            await answer_in_time(request(leaves), for_ever())


async def test_a_server_that_fails_to_report_ends_the_work() -> None:
    """Where nothing can be heard of the caller any more, nothing is worked out for them."""

    async def fails() -> Any:
        raise OSError("the connection is broken")

    async with asyncio.timeout(HANGS):
        with pytest.raises(ClientGone):
            await answer_in_time(request(fails), for_ever())


async def test_a_cancellation_from_outside_is_never_lost() -> None:
    """Who cancels while the work is being given up finds it cancelled, and not answered."""
    ending = asyncio.Event()

    async def work() -> None:
        try:
            await for_ever()
        finally:
            ending.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    task = asyncio.create_task(answer_in_time(request(), work()))
    async with asyncio.timeout(HANGS):
        await ending.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert task.cancelled()


async def test_an_error_leaves_nothing_for_the_garbage_collector() -> None:
    """Full collections are rare, so an overload may not pile up errors that hold their frames."""
    gc.collect()
    gc.disable()
    try:
        error = None
        try:
            await answer_in_time(request(), for_ever())
        except TimedOut as raised:
            error = weakref.ref(raised)
        assert error is not None
        assert error() is None
    finally:
        gc.enable()
