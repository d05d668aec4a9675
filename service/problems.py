"""Every error as `application/problem+json` (RFC 9457): the one place where errors become HTTP.

Below /v2 it is the Open Inference Protocol's error object instead.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from service.context import REFUSED, STARTED, request_id
from service.errors import InvalidInput, Overloaded, RequestError, ShuttingDown, UnableToAnswer
from service.oip_schemas import ProtocolError
from service.protocol import error_text
from service.refusals import log_refusal
from service.schemas import Problem

PROBLEM_MEDIA_TYPE = "application/problem+json"


class ClientGone(Exception):
    """The client left before its answer was ready."""


EXPECTED = (RequestError, HTTPException, ClientGone, ClientDisconnect)
"""What ends a request without being a fault in our code."""


def install(app: FastAPI) -> None:
    """Answer every error with a problem document."""
    for kind in (*EXPECTED, Exception):
        app.exception_handler(kind)(answer)


async def answer(request: Request, error: Exception) -> Response:
    """The answer to a request that ended with `error`."""
    match error:
        case RequestError():
            return await request_error(request, error)
        case HTTPException():
            return _http_error(request, error)
        case ClientGone() | ClientDisconnect():
            # nginx's code for it; nobody receives it, logs and metrics do
            return Response(status_code=499)
        case _:
            return _unexpected(request)


class GivenUp:
    """ASGI middleware that answers requests which the server cancels at the drain limit.

    Whether an answer has begun stands in the request's state, by `Observation`, which must be around this.

    Args:
        stopping: whether the service has been told to stop. Until then nobody cancels a request from outside.
    """

    def __init__(self, app: ASGIApp, *, stopping: Callable[[], bool]) -> None:
        self._app = app
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] != "http" or STARTED in scope.get("state", ()) or not self._stopping():
                raise
            cast("asyncio.Task[None]", asyncio.current_task()).uncancel()
            error = ShuttingDown("The service stopped before the answer was ready.")
            response = await request_error(Request(scope), error)
            await response(scope, receive, send)


async def request_error(request: Request, error: RequestError) -> Response:
    """The answer to a request that gets no result."""
    if isinstance(error, UnableToAnswer):
        log_refusal(error)
    if isinstance(error, Overloaded):
        request.scope.setdefault("state", {})[REFUSED] = True
    problem = Problem(
        type=_urn(error.slug),
        title=error.title,
        status=error.status,
        detail=error.detail,
        received=error.received,
        expected=error.expected,
    )
    return _respond(request, problem, error.headers)


def _http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own: no such path, or a method that the path does not have."""
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    problem = Problem(
        type=_urn(status.phrase.lower().replace(" ", "-")),
        title=status.phrase,
        status=status,
        detail=str(error.detail),
        received=f"{request.method} {request.url.path[:200]}",
        expected=headers.get("Allow") or "a path that /docs lists",
    )
    return _respond(request, problem, headers)


def _unexpected(request: Request) -> Response:
    """A fault of ours. The server logs the stack and hangs up; the caller sees neither stack nor any path."""
    problem = Problem(
        type=_urn("internal-error"),
        title="Internal error",
        status=500,
        detail="The service failed; its log says why.",
    )
    return _respond(request, problem, {"Connection": "close"})


def _urn(slug: str) -> str:
    return f"urn:capsnet:problem:{slug}"


def speaks_protocol(path: str) -> bool:
    """Whether errors below this path are the Open Inference Protocol's."""
    return path == "/v2" or path.startswith("/v2/")


def _respond(request: Request, problem: Problem, headers: dict[str, str]) -> Response:
    if speaks_protocol(request.url.path):
        return _protocol_error(problem, headers)
    problem.request_id = request_id.get() or None
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, problem.status, headers, PROBLEM_MEDIA_TYPE)


def _protocol_error(problem: Problem, headers: dict[str, str]) -> Response:
    """The protocol knows one field and, for every request that is at fault itself, the status 400."""
    text = error_text(problem.detail, problem.received, problem.expected)
    status = HTTPStatus.BAD_REQUEST if problem.status == InvalidInput.status else problem.status
    return Response(ProtocolError(error=text).model_dump_json(), status, headers, "application/json")
