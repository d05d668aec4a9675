"""The hot routes, called without the way through the framework, which costs more than their own work."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import EXPECTED, answer

Handler = Callable[[Request], Awaitable[Response]]


class Direct:
    """ASGI middleware that calls a router's POST handlers itself and leaves every other request to `app`.

    For each request FastAPI tries routes in turn, resolves dependencies and opens exit stacks; a handler that
    takes the plain request and returns a response needs none of it.

    Args:
        router: its POST routes have fixed paths and such handlers.
    """

    def __init__(self, app: ASGIApp, router: APIRouter) -> None:
        self._app = app
        self._routes: dict[str, tuple[APIRoute, Handler]] = {
            route.path: (route, route.endpoint)
            for route in router.routes
            if isinstance(route, APIRoute) and route.methods == {"POST"}
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if found is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        route, handler = found
        scope["route"] = route  # metrics and logs call the request by it
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except Exception as error:
            response = await answer(request, error)
            await response(scope, receive, send)
            if not isinstance(error, EXPECTED):  # the server logs the stack, and hangs up
                raise
            return
        await response(scope, receive, send)
