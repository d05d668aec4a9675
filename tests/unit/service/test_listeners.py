"""Taking an address, and answering on it later."""

import socket
from pathlib import Path

import pytest

from service.errors import StartError
from service.listeners import bind, listen
from service.settings import Settings

pytestmark = pytest.mark.anyio


async def test_an_address_is_taken_before_it_is_answered(tmp_path: Path) -> None:
    """Who connects in between is refused, and of two processes that took it at once the slower one fails."""
    (first,) = await bind(Settings(models=tmp_path, port=0))
    port = first.getsockname()[1]
    (second,) = await bind(Settings(models=tmp_path, port=port))
    with first, second:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        listen([first])
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(StartError, match=rf"CAPSNET_PORT: .*{port}.*: .*in use"):
            listen([second])
