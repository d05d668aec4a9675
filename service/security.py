"""Who may call, from which pages, and what a browser may do with the answers."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service import problems
from service.errors import Unauthorized
from service.keys import KeyRing
from service.oip import HEADER_LENGTH
from service.openapi import ANSWER_HEADERS
from service.pages import PAGE_PATHS
from service.settings import Settings

_HEALTH_PATHS = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
_METRICS_PATHS = frozenset({"/metrics"})

# Beside what a browser's page may always read and send.
_READABLE_HEADERS = (*ANSWER_HEADERS, HEADER_LENGTH)
_SENDABLE_HEADERS = (
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    HEADER_LENGTH,
    "traceparent",
    "tracestate",
    "X-API-Key",
    "X-Request-ID",
)

HEADERS = (
    # Swagger UI sets styles from its script and draws icons from data URLs.
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
"""Of every answer; they keep browsers careful."""


def open_paths(settings: Settings) -> frozenset[str]:
    """Paths that nobody needs a key for: the pages, and by settings health and metrics."""
    paths = PAGE_PATHS
    if not settings.health_needs_key:
        paths |= _HEALTH_PATHS
    if not settings.metrics_needs_key:
        paths |= _METRICS_PATHS
    return paths


def protect(app: ASGIApp, settings: Settings, routes: Sequence[Route]) -> ASGIApp:
    """Put in front of `app`, which has these routes, what the settings ask for."""
    if keys := KeyRing(settings.api_keys):
        app = _KeyCheck(app, keys, open_paths(settings), routes)
    if settings.cors_origins:  # in front of the keys: a preflight request carries none
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=_SENDABLE_HEADERS,
            expose_headers=_READABLE_HEADERS,
        )
    return app


class _KeyCheck:
    """ASGI middleware that refuses what comes without a valid key."""

    def __init__(
        self, app: ASGIApp, keys: KeyRing, open_paths: frozenset[str], routes: Sequence[Route]
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["path"] in self._open_paths
            or self._keys.admits(scope["headers"])
        ):
            await self._app(scope, receive, send)
            return
        # Metrics and logs call the request by it.
        path = scope["path"]
        scope["route"] = next((route for route in self._routes if route.path_regex.fullmatch(path)), None)
        refusal = Unauthorized(
            "This needs an API key.",
            received="no valid key",
            expected="Authorization: Bearer <key>, or X-API-Key: <key>",
        )
        response = await problems.request_error(Request(scope), refusal)
        await response(scope, receive, send)
