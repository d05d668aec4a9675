"""The application: its lifetime, its routes, its answers to errors."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import onnxruntime
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.telemetry import TelemetryConfig
from starlette.routing import Route
from starlette.types import ASGIApp

from service import oip, oip_repository, openapi, pages, problems, routes, security
from service.connections import Connections
from service.decoding import Decoder
from service.direct import Direct
from service.engine import open_engine
from service.handling import Service
from service.metrics import Metrics
from service.observation import Observation
from service.repository import Repository
from service.room import Room
from service.sessions import resolve_device
from service.settings import Settings
from service.tracing import Tracing, open_tracing


class _Application(FastAPI):
    def __init__(self, settings: Settings, metrics: Metrics, tracing: Tracing | None, **parts: Any) -> None:
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        super().__init__(telemetry=_telemetry(tracing), **parts)

    def build_middleware_stack(self) -> ASGIApp:
        inner = super().build_middleware_stack()
        if self._tracing is None:  # FastAPI opens the spans of requests
            inner = Direct(inner, routes.router)
        inner = problems.GivenUp(inner, stopping=self._is_stopping)
        # Around Starlette's own handling of unforeseen errors, so that their answers are observed as well.
        contexts = iter_route_contexts(self.routes)
        known = [context.route for context in contexts if isinstance(context.route, Route)]
        inner = security.protect(inner, self._settings, known)
        inner = Observation(
            inner,
            self._metrics,
            self._tracing,
            access_log=self._settings.access_log,
            headers=security.HEADERS,
        )
        # Outermost, because what follows an answer serves the connection and is no longer the request.
        return Connections(
            inner,
            stopping=self._is_stopping,
            body_timeout=self._settings.body_timeout,
            max_body=self._settings.max_body,
        )

    def _is_stopping(self) -> bool:
        service: Service = self.state["service"]
        return not service.engine.ready


def _telemetry(tracing: Tracing | None) -> TelemetryConfig:
    """FastAPI's part: the span of each request. Figures and logs have their own ways out."""
    return {
        "tracing": tracing is not None,
        "tracer_provider": tracing.provider if tracing else None,
        "operation_spans": False,  # of dependencies and the like, which these routes do not have
        "metrics": False,
        "logs": False,
        "auto_configure": False,
    }


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application. Models are loaded when its lifespan begins."""
    # Here, so that it is found out and logged once, whatever is loaded later.
    settings = settings.model_copy(update={"device": resolve_device(settings.device)})
    metrics = Metrics()
    metrics.build(version("capsnet"), onnxruntime.__version__)
    tracing = open_tracing()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_engine(settings, metrics) as engine:
            decoder = Decoder(settings)
            repository = Repository(settings, engine, metrics) if settings.repository else None
            app.state.service = Service(
                settings, engine, decoder, metrics, tracing, repository, Room(settings.max_bodies)
            )
            try:
                yield
            finally:
                decoder.close()
                if tracing:
                    await asyncio.to_thread(tracing.close)

    app = _Application(
        settings,
        metrics,
        tracing,
        title="Capsule network service",
        version=version("capsnet"),
        description="Class predictions, capsule vectors, reconstructions and perturbed reconstructions.",
        lifespan=lifespan,
        openapi_url=None,  # this and the next are in `pages`
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # what /docs does not list is not there
    )
    app.include_router(routes.router)
    app.include_router(pages.router)
    app.include_router(oip.router)
    if settings.repository:
        app.include_router(oip_repository.router)
    problems.install(app)
    openapi.install(app, settings, open_paths=security.open_paths(settings) if settings.api_keys else None)
    return app
