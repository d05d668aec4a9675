"""The application: its lifetime, its routes, its answers to errors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from service import openapi, problems, routes
from service.decoding import Decoder
from service.engine import open_engine
from service.routes import Service
from service.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application. Models are loaded when its lifespan begins."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_engine(settings) as engine:
            decoder = Decoder(settings)
            app.state.service = Service(settings, engine, decoder)
            try:
                yield
            finally:
                decoder.close()

    app = FastAPI(
        title="Capsule network service",
        version=version("capsnet"),
        description="Class predictions, capsule vectors, reconstructions and perturbed reconstructions.",
        lifespan=lifespan,
        redirect_slashes=False,  # what /docs does not list is not there
    )
    app.include_router(routes.router)
    problems.install(app)
    openapi.install(app)
    return app
