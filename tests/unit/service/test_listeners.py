"""Taking an address, and answering on it later."""

import contextlib
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


async def test_all_addresses_are_those_of_both_families(tmp_path: Path) -> None:
    """Who listens on :: is reached over IPv4 as well, as the container's health check does."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(bound) for bound in await bind(Settings(host="::", port=port))]
        listen(listeners)
        for address in ("::1", "127.0.0.1"):
            socket.create_connection((address, port)).close()
