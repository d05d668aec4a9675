"""What is seen of every request from outside: its id, figures, `Server-Timing`, and a line in the log."""

import time
from collections.abc import Sequence
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import log_access
from service.context import STARTED, Stage, begin_record, identify, request_id, totals
from service.metrics import Metrics
from service.tracing import Tracing

NO_ROUTE = "none"
"""The route of every path that is not there, so that callers cannot make up labels."""


class Observation:
    """ASGI middleware around everything that answers; what keeps and closes connections is outside of it.

    A request keeps the X-Request-ID that it came with, if that is sane, and gets one otherwise.

    Args:
        headers: others that every answer has.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        tracing: Tracing | None,
        *,
        access_log: bool,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._access_log = access_log
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        identity = identify(scope["headers"])
        request_id.set(identity)
        if self._tracing:
            self._tracing.begin(identity)
        stages = begin_record()
        scope.setdefault("state", {})
        status: int | None = None
        ended = 0.0

        async def observed_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                timing = _server_timing(stages, time.perf_counter() - started)
                observed = (b"x-request-id", identity.encode()), (b"server-timing", timing.encode())
                message = {**message, "headers": [*message["headers"], *observed, *self._headers]}
                scope["state"][STARTED] = True
            elif not message.get("more_body"):
                ended = time.perf_counter()  # what follows serves the connection alone
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, observed_send)
        finally:
            self._metrics.in_flight.dec()
            self._observe(scope, status, stages, (ended or time.perf_counter()) - started)
            if self._tracing:
                self._tracing.add_stages(stages)

    def _observe(self, scope: Scope, status: int | None, stages: list[Stage], seconds: float) -> None:
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        self._metrics.request_ended(route, str(status or "aborted"), seconds)
        for stage in stages:
            if stage.name == "image_decode":
                self._metrics.image_decode_seconds.observe(stage.seconds)
        if self._access_log:
            client = scope.get("client")
            log_access(
                client=client[0] if client else None,
                method=scope["method"],
                path=quote(scope["path"]),  # without the query; and a path may hold line breaks
                route=route,
                status=status,
                seconds=seconds,
                stages=stages,
            )


def _server_timing(stages: list[Stage], total: float) -> str:
    """The header's value, in milliseconds, `total` up to the head of the answer."""
    spent = {**totals(stages), "total": total}
    return ", ".join([f"{name};dur={seconds * 1000:.3f}" for name, seconds in spent.items()])
