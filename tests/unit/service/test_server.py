"""The one process that serves, without its application."""

import asyncio
import socket
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn

from service import server as server_module
from service.app import create_app
from service.errors import StartError
from service.handling import Service
from service.server import _Server, _start_grpc
from service.settings import Settings

pytestmark = pytest.mark.anyio


class Engine:
    def __init__(self) -> None:
        self.limits: list[float] = []

    async def close(self, limit: float) -> None:
        self.limits.append(limit)


async def test_all_of_a_stop_counts_against_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uvicorn and the engine may wait for what is left of the drain limit, not for all of it once more."""
    settled = 0.5  # seconds
    monkeypatch.setattr(server_module, "_SETTLE", settled)
    given: list[Any] = []

    async def shutdown(server: uvicorn.Server, sockets: object = None) -> None:
        given.append(server.config.timeout_graceful_shutdown)

    monkeypatch.setattr(uvicorn.Server, "shutdown", shutdown)
    engine = Engine()
    service = SimpleNamespace(engine=engine, settings=SimpleNamespace(drain_timeout=8.0))
    server = _Server(uvicorn.Config("", log_config=None), cast("Service", service), None)
    server.servers = []
    await server.shutdown()
    assert given[0] <= 8 + server_module._LAST_ANSWERS - settled
    assert engine.limits[0] <= 8 - settled


async def test_requests_that_are_given_up_may_say_their_last_words() -> None:
    """Who is about to end is not cancelled once more, and who goes on is."""
    service = SimpleNamespace(engine=Engine(), settings=SimpleNamespace(drain_timeout=8.0))
    server = _Server(uvicorn.Config("", log_config=None), cast("Service", service), None)
    brief, endless = (asyncio.create_task(asyncio.sleep(seconds)) for seconds in (0, 3600))
    server.server_state.tasks = {brief, endless}
    await server._end_what_is_left()
    assert (brief.cancelled(), endless.cancelled()) == (False, True)


async def test_who_left_on_the_way_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a client that is gone before it is served, the descriptor and the count are given back."""

    async def refuse(*_: object) -> None:
        raise OSError("it is not connected any more")

    monkeypatch.setattr(asyncio.get_running_loop(), "connect_accepted_socket", refuse)
    service = SimpleNamespace(engine=Engine(), settings=SimpleNamespace(drain_timeout=8.0))
    config = uvicorn.Config(create_app(Settings()), lifespan="off", log_config=None)
    server = _Server(config, cast("Service", service), None)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    told = []
    with socket.socket() as connection:
        await server._serve_connection(connection, lambda: told.append("closed"))
        assert (connection.fileno(), told) == (-1, ["closed"])


async def test_grpc_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for it without the extra is told which one to install."""
    monkeypatch.setitem(sys.modules, "service.oip_grpc", None)
    service = SimpleNamespace(settings=SimpleNamespace(grpc_port=0))
    with pytest.raises(StartError, match=r"CAPSNET_GRPC_PORT is set, .* install the extra `grpc`"):
        await _start_grpc(cast("Service", service))
