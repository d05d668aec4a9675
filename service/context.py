"""What is known of the request in hand: its id, and the stages that it went through.

Both live in context variables, so that they follow a request through tasks, and reach log lines and
problem documents without being passed along.
"""

import re
import time
from collections.abc import Iterable
from contextvars import ContextVar
from random import getrandbits
from typing import Literal, NamedTuple

StageName = Literal["image_decode", "queue", "encoder", "decoder"]
"""Image decoding, waiting for the device, and the runs of the two graphs."""


class Stage(NamedTuple):
    """A part of the work on a request."""

    name: StageName
    started: float  # seconds of time.perf_counter
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request in hand; empty outside of one."""

trace_id: ContextVar[str] = ContextVar("trace_id", default="")
"""The id of its trace, in hexadecimal; empty where there are no traces."""

REFUSED = "refused"
"""In the ASGI state of a request that was refused for overload."""

WHOLE = "whole"
"""In the ASGI state of a request whose whole body has arrived."""

STARTED = "started"
"""In the ASGI state of a request whose answer has begun."""

# As long as any id in use, and nothing that could forge a log line or a header.
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

_record: ContextVar[list[Stage] | None] = ContextVar("stages", default=None)


def identify(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that a request came with; a new one if there is none, or one that is not sane.

    Args:
        headers: names, in lower case as in ASGI and in gRPC's metadata, and values.
    """
    given = b""
    for name, value in headers:
        if name == b"x-request-id":
            given = value
            break
    return given.decode() if _SANE_ID.fullmatch(given) else f"{getrandbits(128):032x}"


def begin_record() -> list[Stage]:
    """Collect the stages of this task or thread from now on in the list that is returned."""
    stages: list[Stage] = []
    _record.set(stages)
    return stages


def add_stages(stages: Iterable[Stage]) -> None:
    """Add stages that were measured elsewhere to the current record, if there is one."""
    record = _record.get()
    if record is not None:
        record.extend(stages)


def totals(stages: Iterable[Stage]) -> dict[str, float]:
    """Seconds in each stage; one that came several times is summed."""
    sums: dict[str, float] = {}
    for name, started, ended in stages:
        sums[name] = sums.get(name, 0) + ended - started
    return sums


class Measured:
    """Adds the body of a `with` to the current record, if there is one and the body does not fail."""

    def __init__(self, name: StageName) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            add_stages((Stage(self._name, self._started, time.perf_counter()),))
