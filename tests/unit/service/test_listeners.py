"""Taking an address, and answering on it later."""

import asyncio
import contextlib
import re
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


async def test_all_addresses_have_one_free_port(tmp_path: Path) -> None:
    """Where any port will do, no second one is taken that nobody is told of."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    (bound,) = await bind(Settings(models=tmp_path, host="::", port=0))
    bound.close()


async def test_python_that_tells_no_reason_blames_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.13 on asyncio goes past an address that this machine has not, and has no errno."""

    async def no_address(*_: object, **__: object) -> None:
        raise OSError("could not bind on any address out of [('192.0.2.1', 0)]")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_server", no_address)
    with pytest.raises(StartError, match=r"^CAPSNET_HOST: "):
        await bind(Settings(models=tmp_path, host="192.0.2.1", port=0))


@pytest.mark.parametrize("host", ["nope.invalid", "192.0.2.1", "two..dots"])
async def test_a_wrong_host_is_not_blamed_on_the_port(tmp_path: Path, host: str) -> None:
    """A name that nobody has, or an address of another machine, is the host's fault, and no traceback."""
    with pytest.raises(StartError, match=rf"^CAPSNET_HOST: {re.escape(host)}:0 cannot be taken: "):
        await bind(Settings(models=tmp_path, host=host, port=0))
