"""One process that serves: uvicorn and gRPC in one event loop, draining by our rules."""

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from socket import socket
from types import FrameType
from typing import TYPE_CHECKING, cast

import uvicorn

from service.app import create_app
from service.backlog import stop_handshakes
from service.errors import StartError
from service.handling import Service
from service.handover import OWN_FOLDER, Inbox, Notice
from service.http_protocol import LimitedProtocol
from service.listeners import bind, listen
from service.logs import announce
from service.observation import NO_ROUTE
from service.room import Room
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

# Time for those that uvicorn gives up after that; the bodies of some will never be whole. And for threads.
_LAST_WORDS = 0.25  # seconds


class _Server(uvicorn.Server):
    """Uvicorn, draining by our rules and ending with exit code 0.

    It accepts connections itself or, as a worker, takes those that come through `channel`.
    """

    def __init__(self, config: uvicorn.Config, service: Service, channel: socket | None) -> None:
        super().__init__(config)
        self._service = service
        self._engine = service.engine
        self._drain_timeout = service.settings.drain_timeout
        self._channel = channel
        self._inbox: Inbox | None = None
        self._grpc: GrpcServer | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        # Not before uvicorn has taken over the signals: a call that is accepted must be finished.
        self._grpc = await _start_grpc(self._service)
        # Nor before gRPC serves: if that fails, nobody has connected in vain.
        listen(sockets or [])
        if self._channel is not None:
            await super().startup(sockets=[])
            self._inbox = Inbox(self._channel, self._serve_connection, self._orphaned)
            self._inbox.tell(Notice.READY)
            return
        await super().startup(sockets)
        if self.started:
            announce(
                self.servers[0].sockets[0].getsockname(), self._engine.default.device, self._service.settings
            )

    async def _serve_connection(self, connection: socket, closed: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        protocol = partial(
            cast("type[LimitedProtocol]", self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=loop,
            closed=closed,
        )
        try:
            await loop.connect_accepted_socket(protocol, connection)
        except OSError:  # its client has left
            connection.close()
            closed()

    def _orphaned(self) -> None:
        self.handle_exit(signal.SIGTERM, None)
        # Only the files' names go: what the workers that still drain count in stays until they end.
        shutil.rmtree(os.environ.get(OWN_FOLDER, ""), ignore_errors=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            _warn_if_no_file_can_be_opened()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.ready = False
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop accepting, finish what is in flight; at the limit fail what still waits."""
        if self._channel is None:  # of several processes, the first says it
            logger.info(
                "told to stop; what is in flight (%d HTTP requests) has to be answered within %g s",
                len(self.server_state.tasks),
                self._drain_timeout,
            )
        end = time.monotonic() + self._drain_timeout
        limit = asyncio.create_task(self._close_engine_at_limit())
        if self._grpc:
            await self._grpc.leave()
        for listener in sockets or []:
            stop_handshakes(listener)
        if self._inbox is not None:
            self._inbox.tell(Notice.LEAVING)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._inbox.ended.wait(), self._drain_timeout)
        await self._settle()
        left = max(0.0, end + _LAST_ANSWERS - time.monotonic())
        self.config.timeout_graceful_shutdown = left  # type: ignore[assignment] # asyncio takes parts of seconds
        stopping = [super().shutdown(sockets)]
        if self._grpc:
            stopping.append(self._grpc.stop(left))
        await asyncio.gather(*stopping)
        limit.cancel()
        await self._end_what_is_left()
        # Runs whose callers have left.
        await self._engine.close(max(0.0, end - time.monotonic()))

    async def _end_what_is_left(self) -> None:
        """Wait for the last words of requests that uvicorn has cancelled, then cancel what goes on.

        A forced stop leaves all of them to this. Some throw away the rest of a body; their traces end then.
        """
        for _ in range(2):
            if left := set(self.server_state.tasks):
                await asyncio.wait(left, timeout=_LAST_WORDS)
            for task in self.server_state.tasks:
                task.cancel()

    async def _settle(self) -> None:
        """Accept what has connected, and begin to answer what has been asked: the rest will be closed."""
        began = time.monotonic()
        for connection in self.server_state.connections:
            # What a resting client has sent must not be closed unread.
            cast("LimitedProtocol", connection).read_on()
        while (waited := time.monotonic() - began) < _SETTLE or (
            waited < _FIRST_REQUEST
            and any(
                getattr(connection, "cycle", None) is None for connection in self.server_state.connections
            )
        ):
            await asyncio.sleep(0.02)

    async def _close_engine_at_limit(self) -> None:
        await asyncio.sleep(self._drain_timeout)
        await self._engine.close(0)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            # Uvicorn would raise them again, and a service that was told to stop would seem to have died.
            self._captured_signals.clear()


def run(settings: Settings, channel: socket | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        channel: where connections come from if this is a worker; its end means that no process offers any.

    Raises:
        StartError, ManifestError: what the operator has to mend before it can start.
    """
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        # As asyncio's own, but known here.
        threads = ThreadPoolExecutor(thread_name_prefix="asyncio")
        runner.get_loop().set_default_executor(threads)
        runner.run(_serve(settings, channel))
        threads.shutdown(wait=False, cancel_futures=True)
        _leave_threads_behind()


def _leave_threads_behind() -> None:
    """End the process if threads still work for requests that are over: Python would wait for them.

    Nothing can stop a thread that decodes an image, and what it decodes may be anybody's.
    """
    end = time.monotonic() + _LAST_WORDS
    others = [
        thread
        for thread in threading.enumerate()
        if not thread.daemon and thread is not threading.current_thread()
    ]
    for thread in others:
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in others):
        logging.shutdown()
        os._exit(0)


async def _serve(settings: Settings, channel: socket | None) -> None:
    listeners = await bind(settings) if channel is None else None
    app = create_app(settings)

    def count_malformed() -> None:
        app.state.service.metrics.requests.labels(NO_ROUTE, "400").inc()

    config = uvicorn.Config(
        app,
        http=partial(  # type: ignore[arg-type] # a factory does
            LimitedProtocol,
            head_timeout=settings.head_timeout,
            answer_timeout=settings.answer_timeout,
            answer_room=Room(settings.max_bodies, "answers that are not taken yet"),
            malformed=count_malformed,
        ),
        ws="none",  # whatever is installed: it would leave a connection that asks for it without an answer
        lifespan="off",  # entered below, so that a failed start is one line and not a stack
        log_config=None,
        access_log=False,  # ours has the request's id and its stages
        server_header=False,
        timeout_keep_alive=settings.keep_alive,
    )
    async with app.router.lifespan_context(app):
        _calm_interpreter()
        await _Server(config, app.state.service, channel).serve(listeners)
    if channel is None:
        logger.info("stopped")


def _warn_if_no_file_can_be_opened() -> None:
    """Say what the event loop keeps to itself: it resets connections that it has no descriptor for."""
    try:
        socket().close()
    except OSError as error:
        logger.error("new connections cannot be served: %s", error)


def _calm_interpreter() -> None:
    """Keep Python's own pauses, each as long as a batch, out of the requests'."""
    # What is there now stays: no collection needs to look at it again.
    gc.collect()
    gc.freeze()
    # It would look for garbage after 700 or 2,000 objects, by its version; a batch's requests are more.
    gc.set_threshold(5_000)
    # A batcher's thread whose run has ended would else wait up to 5 ms while the event loop is busy.
    sys.setswitchinterval(0.0005)  # seconds


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
