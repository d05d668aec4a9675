"""The sockets on which HTTP is awaited: the address is taken early, and answered once there is who serves."""

import asyncio
import errno
import socket
from collections.abc import Iterable

from service.errors import StartError
from service.settings import Settings

# Connections that the kernel keeps for us; uvicorn's own default.
_BACKLOG = 2048


async def bind(settings: Settings) -> list[socket.socket]:
    """Take the address before models are loaded, and answer nobody yet.

    Raises:
        StartError: it cannot be taken.
    """
    host, port = settings.host, settings.port
    # An event loop's socket for :: takes IPv6 alone. With port 0 the other would get a port of its own.
    hosts = [host, "0.0.0.0"] if host == "::" and port else host  # noqa: S104 # what was asked for
    try:
        server = await asyncio.get_running_loop().create_server(
            asyncio.Protocol, hosts, port, start_serving=False
        )
    except (OSError, UnicodeError) as error:
        # Of a name that is unknown or none, or of another machine's address, the port is innocent. For the
        # latter Python 3.13 has no errno.
        code = getattr(error, "errno", None)
        innocent = isinstance(error, socket.gaierror) or code in (None, errno.EADDRNOTAVAIL)
        setting = "CAPSNET_HOST" if innocent else "CAPSNET_PORT"
        raise StartError(f"{setting}: {host}:{port} cannot be taken: {error}") from error
    # Duplicates, because an event loop's own objects do nothing but tell of themselves.
    listeners = [socket.fromfd(bound.fileno(), bound.family, bound.type) for bound in server.sockets]
    server.close()
    for listener in listeners:
        listener.setblocking(False)
    return listeners


def listen(listeners: Iterable[socket.socket]) -> None:
    """Let the kernel make connections.

    Raises:
        StartError: another process was faster.
    """
    for listener in listeners:
        try:
            listener.listen(_BACKLOG)
        except OSError as error:
            raise StartError(f"CAPSNET_PORT: {listener.getsockname()}: {error}") from error
