"""The one process that serves, without its application."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn

from service import server as server_module
from service.handling import Service
from service.server import _Server

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
    server = _Server(uvicorn.Config(""), cast("Service", service), None)
    server.servers = []
    await server.shutdown()
    assert given[0] <= 8 + server_module._LAST_ANSWERS - settled
    assert engine.limits[0] <= 8 - settled
