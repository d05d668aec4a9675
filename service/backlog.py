"""Closing a listening socket without losing a connection.

Closing it resets every connection whose handshake is done but that was not accepted yet, and with it a
request that its client has already sent. So the kernel is first told to answer no new handshake, what is
there is accepted, and only then the socket is closed. A client that comes in between tries its handshake
again, and is then refused: it knows that its request never began.
"""

import contextlib
import ctypes
import socket
import struct

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it

# Classic BPF over the TCP header (linux/filter.h: code, jump if true, jump if false, operand).
_NO_NEW_HANDSHAKE = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte of flags
        (0x54, 0, 0, 0x12),  # of which SYN and ACK
        (0x15, 0, 1, 0x02),  # SYN alone begins a handshake:
        (0x06, 0, 0, 0),  # drop it
        (0x06, 0, 0, 0xFFFF_FFFF),  # pass everything else
    )
)


def stop_handshakes(listener: socket.socket) -> None:
    """Let the kernel drop new connections; those it has already made can still be accepted.

    Only Linux can do it. Elsewhere nothing happens, and a connection that is made in the instant before
    the close may be lost.
    """
    instructions = ctypes.create_string_buffer(_NO_NEW_HANDSHAKE, len(_NO_NEW_HANDSHAKE))
    program = struct.pack("HP", len(_NO_NEW_HANDSHAKE) // 8, ctypes.addressof(instructions))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
