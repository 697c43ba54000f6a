"""Lines: connections to workers of Ray on this machine, through which a task is given more calls than its first.

::

    worker ──number of its task, then answers──▶ Peers of the main program
           ◀──────────────calls───────────────── give

Ray gives a task a worker and takes it back at its end; that takes most of the time of a cheap call.
"""

from __future__ import annotations

import contextlib
import socket
import struct

from evalkit.backends import Peer, PeerAddress, connect_peer, frame

__all__ = ["LONGEST", "answer", "connect", "give", "hang_up", "leave", "receive"]

LONGEST = 2**16  # bytes of a message: what fits into the buffer of a socket that is empty, so that nobody waits to send

_LENGTH = struct.Struct("<Q")  # before each call, as in a frame
_CONNECT_TIMEOUT = 1.0  # seconds


# -- the main program's end -------------------------------------------------------------------------------------------


def give(line: Peer, call: bytes) -> bool:
    """Send a call to a worker that waits for one; say whether it is there. From any thread, while the line is open."""
    message = frame(call)
    try:
        with contextlib.suppress(BlockingIOError):
            line.sock.recv(1, socket.MSG_PEEK)
            return False  # it has nothing to say, so it has hung up
        if line.sock.send(message) == len(message):
            return True
    except OSError:
        return False
    hang_up(line)  # and so it does not get the half of it
    return False


def hang_up(line: Peer) -> None:
    """Let the worker go; from any thread."""
    with contextlib.suppress(OSError):
        line.sock.shutdown(socket.SHUT_RDWR)


# -- the worker's end -------------------------------------------------------------------------------------------------


def connect(address: PeerAddress, number: int) -> socket.socket | None:
    """A line to the main program, for the task of this number; None if there is no way."""
    try:
        return connect_peer(address, number, _CONNECT_TIMEOUT)
    except Exception:  # noqa: BLE001 - jobs may have done anything to this process; the answer has another way
        return None


def answer(line: socket.socket, message: bytes) -> bool:
    """Send an answer; say whether it will be heard."""
    try:
        line.settimeout(None)
        line.sendall(frame(message))
    except Exception:  # noqa: BLE001 - as above
        return False
    return True


def receive(line: socket.socket, timeout: float) -> bytes | None:
    """The next call; None if there is none within so many seconds, or ever."""
    incoming = b""
    try:
        line.settimeout(timeout)
        while len(incoming) < _LENGTH.size or len(incoming) < _LENGTH.size + _LENGTH.unpack_from(incoming)[0]:
            data = line.recv(_LENGTH.size + LONGEST)
            if not data:
                return None
            incoming += data
    except Exception:  # noqa: BLE001 - as above
        return None
    return incoming[_LENGTH.size :]


def leave(line: socket.socket) -> None:
    """Close the worker's end."""
    with contextlib.suppress(OSError):  # a job has closed it
        line.close()
