"""Handing connections from the process that accepts them to the worker that serves them.

A socket pair joins the two. One way go the connections, as file descriptors; nothing more will come once that
way is shut. The other way go notices of one byte. The accepting process keeps a connection until the worker
has taken it, so a worker that dies before takes nobody's connection with it.
"""

import array
import asyncio
import json
import os
import socket
from collections.abc import Callable, Coroutine
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

CHANNEL = "_CAPSNET_CHANNEL"
"""The environment variable that tells a worker the file descriptor of its end."""

OWN_FOLDER = "_CAPSNET_METRICS_FOLDER"
"""And where the workers count, if that folder was made for them: the last to know of it removes it."""

PLACE = "_CAPSNET_PLACE"
"""And the name of its place among them, which it takes over with the counters of the worker before it."""

MODELS = "_CAPSNET_MODELS"
"""And what it serves: in JSON, each model folder with its manifest's checksum."""


class Notice(IntEnum):
    """What a worker tells."""

    READY = 1  # its models have run once
    TAKEN = 2  # it has the connection that was offered longest ago
    CLOSED = 3  # one that it had is closed
    LEAVING = 4  # it was told to stop: offer it no more
    FAILED = 5  # it cannot start; the reason follows, in UTF-8


def offer(channel: socket.socket, connection: socket.socket) -> None:
    """Send a connection to a worker.

    Raises:
        OSError: the worker is dead, or does not read.
    """
    descriptors = array.array("i", [connection.fileno()])
    channel.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])


def worker_channel() -> socket.socket | None:
    """The channel of this process if it was started as a worker."""
    number = os.environ.pop(CHANNEL, None)
    return socket.socket(fileno=int(number)) if number else None


def agreed_models() -> dict[Path, str] | None:
    """The model folders that all workers serve, each with its manifest's checksum; None if this is none."""
    agreed = os.environ.get(MODELS)
    return {Path(folder): checksum for folder, checksum in json.loads(agreed).items()} if agreed else None


class Inbox:
    """A worker's end: serves each connection that is offered, and tells what becomes of it.

    Args:
        channel: this end of the socket pair.
        serve: begins to serve a connection; it calls the function that it is given when that is closed.
        orphaned: called when the other process is dead.
    """

    def __init__(
        self,
        channel: socket.socket,
        serve: Callable[[socket.socket, Callable[[], None]], Coroutine[Any, Any, None]],
        orphaned: Callable[[], None],
    ) -> None:
        self.ended = asyncio.Event()
        """Set when nothing more will be offered."""
        self._channel = channel
        self._serve = serve
        self._orphaned = orphaned
        self._leaving = False
        self._unsent = bytearray()
        self._beginning: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        channel.setblocking(False)
        self._loop.add_reader(channel, self._receive)

    def tell(self, notice: Notice) -> None:
        self._leaving |= notice is Notice.LEAVING
        self._unsent.append(notice)
        self._send()

    def _receive(self) -> None:
        try:
            mark, descriptors, *_ = socket.recv_fds(self._channel, 1, 1)
        except BlockingIOError:
            return
        except OSError:  # the other process died with notices unread
            mark, descriptors = b"", []
        if not mark:
            self._loop.remove_reader(self._channel)
            self.ended.set()
            if not self._leaving:
                self._orphaned()
            return
        self.tell(Notice.TAKEN)
        if not descriptors:  # lost: this process may open no more files
            self.tell(Notice.CLOSED)
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            connection.setblocking(False)
            task = self._loop.create_task(self._serve(connection, partial(self.tell, Notice.CLOSED)))
            self._beginning.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._beginning.discard)

    def _send(self) -> None:
        self._loop.remove_writer(self._channel)
        try:
            del self._unsent[: self._channel.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # nobody is left to be told
            self._unsent.clear()
        if self._unsent:
            self._loop.add_writer(self._channel, self._send)
