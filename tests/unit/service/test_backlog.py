"""A listening socket that takes no new connections, yet keeps those that are made."""

import socket
import sys

import pytest

from service.backlog import stop_handshakes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux filters what reaches a listening socket")
def test_what_is_connected_stays_and_nothing_new_comes() -> None:
    """A connection in the backlog can still be accepted and used; another's handshake has no answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as early:
            stop_handshakes(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.2)
            early.sendall(b"request")
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(100) == b"request"
                accepted.sendall(b"answer")
                assert early.recv(100) == b"answer"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
