"""What the handlers of all routes stand on: the service in the application's state, and answers in time."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from service.decoding import Decoder
from service.engine import Engine
from service.errors import TimedOut
from service.metrics import Metrics
from service.problems import ClientGone
from service.repository import Repository
from service.room import Room
from service.settings import Settings
from service.tracing import Tracing

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A caller who leaves is noticed after this time: watching costs a task, and most answers are ready sooner.
_UNWATCHED = 0.05  # seconds


class Router(APIRouter):
    """Answers HEAD wherever it answers GET (RFC 9110, 9.1), which only a GET is documented for."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **parts: Any) -> None:
        if parts.get("methods") == ["GET"]:
            # First, so that a refused method hears of both. The server sends no body after HEAD.
            both = {**parts, "methods": ["GET", "HEAD"], "include_in_schema": False}
            super().add_api_route(path, endpoint, **both)
        super().add_api_route(path, endpoint, **parts)


@dataclass(frozen=True)
class Service:
    """What the routes stand on, kept in the application's state."""

    settings: Settings
    engine: Engine
    decoder: Decoder
    metrics: Metrics
    tracing: Tracing | None
    repository: Repository | None
    """None where its extension is off."""
    body_room: Room


def service_of(request: Request) -> Service:
    service: Service = request.scope["app"].state["service"]  # as an attribute: nine times as long
    return service


async def answer_in_time(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` while the caller is there, up to the time limit.

    Raises:
        TimedOut: it took too long.
        ClientGone: nobody waits for it any more.
    """
    task: Any = asyncio.current_task()  # never None: a coroutine always runs in a task
    limit = service_of(request).settings.request_timeout
    unwatched = min(_UNWATCHED, limit)
    given_up: Exception | None = None

    async def watch() -> None:
        nonlocal given_up
        try:
            async with asyncio.timeout(limit - unwatched):
                while (await request.receive())["type"] != "http.disconnect":
                    pass
            given_up = ClientGone()
        except TimeoutError:
            given_up = TimedOut(f"There was no answer within {limit:g} s.", retry_after=1)
        except Exception:
            logger.exception(
                "the server no longer says whether a caller is there; they are taken to have left"
            )
            given_up = ClientGone()
        task.cancel()

    watcher: asyncio.Task[None] | None = None

    def begin_to_watch() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    timer = asyncio.get_running_loop().call_later(unwatched, begin_to_watch)
    try:
        return await work
    except asyncio.CancelledError:
        # What remains of the cancellations, once ours is taken back, is somebody else's.
        if given_up is None or task.uncancel():
            raise
        raise given_up from None
    finally:
        given_up = None  # its traceback holds this frame
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
