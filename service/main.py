"""`capsnet-serve`: settings, start, serve, drain, exit."""

import asyncio
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from socket import fromfd, socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from pydantic import ValidationError

from service import logs
from service.app import create_app
from service.backlog import stop_handshakes
from service.engine import Engine
from service.errors import StartError
from service.handling import Service
from service.manifest import ManifestError
from service.settings import Settings

if TYPE_CHECKING:
    from service.oip_grpc import Server as GrpcServer

logger = logging.getLogger(__name__)

# Time for the clients of kept connections to hear, with their next answer, that they have to go elsewhere.
_SETTLE = 0.25  # seconds

# Time for a connection that was just made to hand over its first request.
_FIRST_REQUEST = 1.0  # seconds

# What stays of the drain limit's last moments to write out the answers of requests that ran into it.
_LAST_ANSWERS = 1.0  # seconds


class _Server(uvicorn.Server):
    """Uvicorn, draining by our rules and ending with exit code 0."""

    def __init__(
        self, config: uvicorn.Config, engine: Engine, settings: Settings, grpc: "GrpcServer | None"
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._settings = settings
        self._grpc = grpc

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            device = self._engine.default.device
            address = f"[{host}]" if ":" in host else host
            logger.info("serving on http://%s:%d (%s), documented at /docs", address, port, device)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.ready = False
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop accepting, finish what is in flight; at the limit fail what still waits."""
        limit = asyncio.create_task(self._close_engine_at_limit())
        if self._grpc:
            await self._grpc.leave()
        for server in self.servers:
            for listener in server.sockets:
                # A duplicate, because an event loop's own object does not take options.
                with fromfd(listener.fileno(), listener.family, listener.type) as duplicate:
                    stop_handshakes(duplicate)
        await self._settle()
        stopping = [super().shutdown(sockets)]
        if self._grpc:
            stopping.append(self._grpc.stop(self._settings.drain_timeout + _LAST_ANSWERS))
        await asyncio.gather(*stopping)
        limit.cancel()

    async def _settle(self) -> None:
        """Accept what has connected, and begin to answer what has been asked: the rest will be closed."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < _SETTLE or (
            waited < _FIRST_REQUEST
            and any(
                getattr(connection, "cycle", None) is None for connection in self.server_state.connections
            )
        ):
            await asyncio.sleep(0.02)

    async def _close_engine_at_limit(self) -> None:
        await asyncio.sleep(self._settings.drain_timeout)
        await self._engine.close(0)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            # Uvicorn would raise them again, and a service that was told to stop would seem to have died.
            self._captured_signals.clear()


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        StartError, ManifestError: what the operator has to mend before it can start.
    """
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        lifespan="off",  # entered below, so that a failed start is one line and not a stack
        log_config=None,
        access_log=False,  # ours has the request's id and its stages
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout + _LAST_ANSWERS),
    )
    async with app.router.lifespan_context(app):
        service = app.state.service
        grpc = await _start_grpc(service)
        await _Server(config, service.engine, settings, grpc).serve()


async def _start_grpc(service: Service) -> "GrpcServer | None":
    if service.settings.grpc_port is None:
        return None
    try:
        from service.oip_grpc import start_server  # noqa: PLC0415 # gRPC is an optional extra
    except ModuleNotFoundError as error:
        raise StartError(
            f"CAPSNET_GRPC_PORT is set, but {error.name} is not installed; install the extra `grpc`"
        ) from error
    return await start_server(service)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service; returns the process's exit code."""
    try:
        settings = Settings(_cli_parse_args=list(sys.argv[1:] if arguments is None else arguments))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "".join(f"CAPSNET_{str(part).upper()}: " for part in first["loc"][:1])
        received = "a secret" if first["loc"][:1] == ("api_keys",) else repr(first["input"])
        sys.stderr.write(f"capsnet-serve: {name}{first['msg']} (received {received})\n")
        return 2
    logs.configure(settings)
    try:
        with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
            runner.run(serve(settings))
    except (StartError, ManifestError) as error:
        sys.stderr.write(f"capsnet-serve: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
