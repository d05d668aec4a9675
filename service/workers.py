"""Several processes that serve, and the one that starts them, shares out connections, and stops them.

This process accepts every connection and hands it to the worker that has the fewest. It loads no model and
reads no request. See docs/decisions/0017.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.multiprocess import mark_process_dead

from service.backlog import stop_handshakes
from service.errors import StartError
from service.handover import CHANNEL, MODELS, OWN_FOLDER, PLACE, Notice, offer
from service.listeners import bind, listen
from service.logs import announce
from service.manifest import manifest_checksum, model_folders
from service.settings import Settings

logger = logging.getLogger(__name__)

# Connections that a worker was offered and has not taken; more wait in the kernel, for whoever has room.
_MOST_OFFERED = 64

# Handshakes that have begun before the stop are done in this time.
_SETTLE = 0.25  # seconds

# Beyond the drain limit: for workers to find first requests, write last answers and end.
_ENDING = 5.0  # seconds

# Before a worker that died young is replaced; doubled each time, up to the second.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds

# A worker that lived so long did not die of its start.
_OLD_AGE = 60.0  # seconds

# Before trying again to accept or hand over a connection when the system refused.
_RETRY = 0.1  # seconds


@dataclass(eq=False)
class _Worker:
    process: asyncio.subprocess.Process
    channel: socket.socket
    ready: bool = False  # to be offered connections
    failure: str = ""  # why it could not start
    taken: int = 0  # connections that it has
    offered: deque[socket.socket] = field(default_factory=deque)  # and those that it has not taken yet

    @property
    def load(self) -> int:
        return self.taken + len(self.offered)

    def end_offers(self) -> None:
        """Let the worker read that nothing more will come."""
        self.ready = False
        with contextlib.suppress(OSError):  # it is dead already
            self.channel.shutdown(socket.SHUT_WR)


def supervise(settings: Settings) -> None:
    """Serve with `settings.workers` processes until SIGTERM or SIGINT.

    Raises:
        StartError, ManifestError: what the operator has to mend before it can start.
    """
    # Read once: a version that comes later must not be served by those workers alone that start after it.
    models = {str(folder): manifest_checksum(folder) for folder in model_folders(settings.models)}
    with _metrics_folder() as folder:
        asyncio.run(_Supervisor(settings, folder, json.dumps(models)).run())


@contextlib.contextmanager
def _metrics_folder() -> Iterator[str]:
    """Where the workers count together: the operator's choice, or a folder of our own until the end."""
    if given := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        yield given
        return
    # In memory where that can be had: counting must not wait for a disk, and a full one kills whoever counts.
    memory = "/dev/shm"  # noqa: S108 # the folder in it gets a random name
    try:
        folder = tempfile.mkdtemp(
            prefix="capsnet-metrics-", dir=memory if os.access(memory, os.W_OK | os.X_OK) else None
        )
    except OSError as error:
        raise StartError(
            f"several workers need a folder to count in, and none can be made: {error}; "
            "name an empty one in PROMETHEUS_MULTIPROC_DIR"
        ) from error
    os.environ[OWN_FOLDER] = folder
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Supervisor:
    def __init__(self, settings: Settings, metrics_folder: str, models: str) -> None:
        self._settings = settings
        self._metrics_folder = metrics_folder
        self._models = models
        self._workers: list[_Worker] = []  # that with the newest connection is last
        self._listeners: list[socket.socket] = []
        self._watching = False  # the listeners
        self._retry: asyncio.TimerHandle | None = None
        self._homeless: deque[socket.socket] = deque()  # connections whose worker died before it took them
        self._serving = False
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()  # something that `_all_ready` waits for
        self._failure = ""

    async def run(self) -> None:
        """Start all workers, keep their number, and stop them.

        Raises:
            StartError: the address cannot be taken, or a worker did not start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        self._listeners = await bind(self._settings)
        places = [asyncio.create_task(self._fill_place(number)) for number in range(self._settings.workers)]
        try:
            if await self._all_ready():
                self._begin_to_serve()
                await self._stopping.wait()
                logger.info(
                    "told to stop; what is in flight in %d workers has to be answered within %g s",
                    len(self._workers),
                    self._settings.drain_timeout,
                )
                await self._hand_over_the_rest()
            await asyncio.wait(places, timeout=self._settings.drain_timeout + _ENDING)
        finally:
            self._stopping.set()
            for worker in self._workers:
                worker.process.kill()
            await asyncio.gather(*places)
        logger.info("stopped")

    async def _all_ready(self) -> bool:
        """Wait for the workers' start; False if a signal came before its end."""
        while not self._stopping.is_set():
            if self._failure:
                raise StartError(self._failure)
            if sum(worker.ready for worker in self._workers) == self._settings.workers:
                return True
            await self._changed.wait()
            self._changed.clear()
        return False

    def _begin_to_serve(self) -> None:
        listen(self._listeners)
        self._serving = True
        self._share_out()
        announce(self._listeners[0].getsockname(), f"{self._settings.workers} workers", self._settings)

    def _told_to_stop(self, number: int) -> None:
        self._stopping.set()
        self._changed.set()
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(number)

    async def _hand_over_the_rest(self) -> None:
        """Accept what has connected already, then let the workers know that it was all."""
        deadline = time.monotonic() + self._settings.drain_timeout
        for listener in self._listeners:
            stop_handshakes(listener)
        await asyncio.sleep(_SETTLE)
        while self._workers and not self._watching and time.monotonic() < deadline:  # none has room for all
            await asyncio.sleep(_RETRY)
        self._watch(False)
        self._serving = False
        for listener in self._listeners:
            listener.close()
        for worker in self._workers:
            worker.end_offers()

    # Workers.

    async def _fill_place(self, number: int) -> None:
        """Keep one worker running, and another after it."""
        pause = 0.0
        while not self._stopping.is_set():
            born = time.monotonic()
            try:
                worker = await self._start(number)
            except (OSError, RuntimeError) as error:  # no process, thread, memory or file descriptor is left
                ended = failure = f"a worker cannot be started: {error}"
            else:
                code = await worker.process.wait()
                self._bury(worker)
                reason = f" ({worker.failure})" if worker.failure else ""
                ended = f"worker {worker.process.pid} ended with exit code {code}{reason}"
                failure = worker.failure or f"a worker ended with exit code {code} during its start"
            if self._stopping.is_set():
                return
            if not self._serving:
                self._failure = failure
                self._changed.set()
                return
            old = time.monotonic() - born > _OLD_AGE
            pause = 0.0 if old else min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
            logger.error("%s; another starts in %g s", ended, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _start(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as unless_started, theirs:
            unless_started.enter_context(ours)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *sys.orig_argv[1:],  # this process's own command, so that both read the same settings
                env={
                    **os.environ,
                    CHANNEL: str(theirs.fileno()),
                    MODELS: self._models,
                    # Others may count in the same folder, each process under its own number.
                    PLACE: f"{os.getpid()}-{number}",
                    "PROMETHEUS_MULTIPROC_DIR": self._metrics_folder,
                },
                pass_fds=(theirs.fileno(),),
                process_group=0,  # a terminal's Ctrl-C reaches this process alone, which passes it on
            )
            unless_started.pop_all()
        ours.setblocking(False)
        worker = _Worker(process, ours)
        self._workers.append(worker)
        asyncio.get_running_loop().add_reader(ours, self._hear, worker)
        if self._stopping.is_set():  # the signal came in between
            process.terminate()
        return worker

    def _bury(self, worker: _Worker) -> None:
        """Forget a dead worker, and offer others what it had not taken."""
        while self._hear(worker):
            pass
        worker.channel.close()
        self._workers.remove(worker)
        self._homeless.extend(worker.offered)
        mark_process_dead(worker.process.pid, self._metrics_folder)  # type: ignore[no-untyped-call] # theirs
        self._share_out()

    def _hear(self, worker: _Worker) -> bool:
        """Act on what a worker told; False when it has told all."""
        try:
            notices = worker.channel.recv(65536)
        except BlockingIOError:
            return False
        except OSError:  # it died with offers unread
            notices = b""
        if not notices:
            asyncio.get_running_loop().remove_reader(worker.channel)
            return False
        for position, notice in enumerate(notices, start=1):
            match notice:
                case Notice.READY:
                    worker.ready = True
                    self._changed.set()
                case Notice.TAKEN:
                    worker.offered.popleft().close()
                    worker.taken += 1
                case Notice.CLOSED:
                    worker.taken -= 1
                case Notice.LEAVING if not (self._serving and self._stopping.is_set()):
                    worker.end_offers()  # it alone was told to stop, or nothing was ever accepted
                case Notice.FAILED:
                    worker.failure = notices[position:].decode()
                    break
        self._share_out()
        return True

    # Connections.

    def _share_out(self) -> None:
        """Offer each connection that waits to the worker with the fewest, as long as one has room."""
        if not self._serving:
            return
        while worker := self._least_loaded():
            try:
                connection = self._homeless.popleft() if self._homeless else self._accept()
            except OSError as error:  # most likely no file descriptor is left
                logger.error("a connection cannot be accepted yet: %s", error)
                self._share_out_later()
                return
            if connection is None:
                self._watch(True)
                return
            try:
                offer(worker.channel, connection)
            except OSError:  # the worker has just died, or the system is out of room
                self._homeless.appendleft(connection)
                self._share_out_later()
                return
            worker.offered.append(connection)
            self._workers.remove(worker)
            self._workers.append(worker)
        self._watch(False)  # or the loop would never rest

    def _least_loaded(self) -> _Worker | None:
        """The ready worker with the fewest connections; of equals the one that has waited longest."""
        roomy = (worker for worker in self._workers if worker.ready and len(worker.offered) < _MOST_OFFERED)
        return min(roomy, key=lambda worker: worker.load, default=None)

    def _accept(self) -> socket.socket | None:
        for listener in self._listeners:
            with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                return listener.accept()[0]
        return None

    def _share_out_later(self) -> None:
        self._watch(False)
        if self._retry:
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_later(_RETRY, self._share_out)

    def _watch(self, watching: bool) -> None:
        """Have `_share_out` called for each new connection, or for none."""
        if watching != self._watching:
            self._watching = watching
            loop = asyncio.get_running_loop()
            for listener in self._listeners:
                if watching:
                    loop.add_reader(listener, self._share_out)
                else:
                    loop.remove_reader(listener)
