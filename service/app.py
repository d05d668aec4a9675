"""The application: its lifetime, its routes, its answers to errors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import onnxruntime
from fastapi import FastAPI
from starlette.types import ASGIApp

from service import docs, oip, openapi, problems, routes, security
from service.connections import Connections
from service.decoding import Decoder
from service.engine import open_engine
from service.handling import Service
from service.metrics import Metrics
from service.observation import Observation
from service.settings import Settings


class _Application(FastAPI):
    def __init__(self, settings: Settings, metrics: Metrics, **parts: Any) -> None:
        self._settings = settings
        self._metrics = metrics
        super().__init__(**parts)

    def build_middleware_stack(self) -> ASGIApp:
        # Around Starlette's own handling of unforeseen errors, so that their answers are observed as well.
        inner = security.protect(super().build_middleware_stack(), self._settings)
        inner = Connections(
            inner,
            stopping=lambda: not self.state.service.engine.ready,
            body_timeout=self._settings.body_timeout,
            max_body=self._settings.max_body,
        )
        return Observation(inner, self._metrics, access_log=self._settings.access_log)


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application. Models are loaded when its lifespan begins."""
    metrics = Metrics()
    metrics.build(version("capsnet"), onnxruntime.__version__)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_engine(settings, metrics) as engine:
            decoder = Decoder(settings)
            app.state.service = Service(settings, engine, decoder, metrics)
            try:
                yield
            finally:
                decoder.close()

    app = _Application(
        settings,
        metrics,
        title="Capsule network service",
        version=version("capsnet"),
        description="Class predictions, capsule vectors, reconstructions and perturbed reconstructions.",
        lifespan=lifespan,
        docs_url=None,  # ours is in `docs`
        redoc_url=None,
        redirect_slashes=False,  # what /docs does not list is not there
    )
    app.include_router(routes.router)
    app.include_router(docs.router)
    app.include_router(oip.router)
    problems.install(app)
    openapi.install(app, settings, open_paths=security.open_paths(settings) if settings.api_keys else None)
    return app
