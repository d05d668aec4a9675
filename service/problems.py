"""Every error as `application/problem+json` (RFC 9457): the one place where errors become HTTP."""

import logging
from http import HTTPStatus

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.errors import RequestError, UnableToAnswer

logger = logging.getLogger(__name__)

PROBLEM_MEDIA_TYPE = "application/problem+json"


class ClientGone(Exception):
    """The client left before its answer was ready."""


def install(app: FastAPI) -> None:
    """Answer every error with a problem document."""
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _nobody_there)
    app.add_exception_handler(ClientDisconnect, _nobody_there)
    app.add_exception_handler(Exception, _unexpected)


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    if isinstance(error, UnableToAnswer):
        logger.warning("%s: %s", error.title, error.detail)
    return _problem(
        error.status, error.slug, error.title, error.detail, error.received, error.expected, error.headers
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or a method that the path does not have."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    return _problem(
        status,
        status.phrase.lower().replace(" ", "-"),
        status.phrase,
        str(error.detail),
        f"{request.method} {request.url.path[:200]}",
        headers.get("Allow") or "a path that /docs lists",
        headers,
    )


async def _nobody_there(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nginx's code for it; nobody receives it, logs and metrics do


async def _unexpected(_: Request, __: Exception) -> Response:
    """A fault of ours. The server logs the stack; the caller sees neither it nor any path."""
    return _problem(500, "internal-error", "Internal error", "The service failed; its log says why.")


def _problem(
    status: int,
    slug: str,
    title: str,
    detail: str,
    received: str | None = None,
    expected: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    document = {
        "type": f"urn:capsnet:problem:{slug}",
        "title": title,
        "status": int(status),
        "detail": detail,
        "received": received,
        "expected": expected,
    }
    body = orjson.dumps({name: value for name, value in document.items() if value is not None})
    return Response(body, status, headers, PROBLEM_MEDIA_TYPE)
