"""Lines: connections to workers of Ray on this machine, through which a task is given more calls than its first.

::

    worker ──token, number of its task, then answers──▶ turn ──▶ who has the lines
           ◀──────────────calls──────────────────────── send

Ray gives a task a worker and takes it back at its end; that takes most of the time of a cheap call.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Iterator

__all__ = ["LONGEST", "Address", "Line", "Lines", "connect", "receive", "send"]

LONGEST = 2**16  # bytes of a message: what fits into the buffer of a socket that is empty, so that nobody waits to send

_HOST = "127.0.0.1"
_LENGTH = struct.Struct("<I")  # before each message
_NUMBER = struct.Struct("<Q")
_TOKEN_BYTES = 32
_CONNECT_TIMEOUT = 1.0  # seconds
_PAUSE = 0.01  # seconds

#: The port, and the token.
Address = tuple[int, bytes]


class Lines:
    """The main program's ends of all lines. They belong to the thread that calls :meth:`turn`."""

    def __init__(self) -> None:
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = socket.create_server((_HOST, 0), backlog=128)
        self._listener.setblocking(False)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._received = memoryview(bytearray(2 * LONGEST))  # one for all: a new one for each read is slow to get
        self._open: set[Line] = set()

    @property
    def address(self) -> Address:
        return self._listener.getsockname()[1], self._token

    def wake(self) -> None:
        """End the turn, or the next one; from any thread."""
        with contextlib.suppress(OSError):  # it is about to end, or they are closed
            self._wake.send(b"\0")

    def turn(self, timeout: float) -> list[tuple[Line, bytes | None]]:
        """Wait for messages, at most ``timeout`` seconds; return those that came, and None for each line that has ended
        and is to be closed.
        """
        heard: list[tuple[Line, bytes | None]] = []
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            else:
                line: Line = key.data
                try:
                    heard += [(line, message) for message in line.read(self._received)]
                except OSError:  # the worker has gone
                    self._forget(line)
                    heard.append((line, None))
        return heard

    def drain(self) -> Iterator[tuple[Line, bytes | None]]:
        """What has been sent by now: on one machine, it is here."""
        for _ in range(1000):  # others send too, and are not to keep us
            if not self._selector.select(0):
                break
            yield from self.turn(0)

    def drop(self, line: Line) -> None:
        """Close a line."""
        if line in self._open:
            self._forget(line)
        line.close()

    def close(self) -> None:
        for line in list(self._open):
            self.drop(line)
        self._selector.close()
        for sock in (self._listener, self._woken, self._wake):
            sock.close()

    def _forget(self, line: Line) -> None:
        self._open.remove(line)
        self._selector.unregister(line.sock)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are no descriptors left
            time.sleep(_PAUSE)
            return
        sock.setblocking(False)
        _set_up(sock)
        line = Line(sock, self._token)
        self._open.add(line)
        self._selector.register(sock, selectors.EVENT_READ, line)


class Line:
    """One of them.

    Attributes:
        sock: its socket.
        number: of the task at the other end; None until it has said so, and that it knows the token.
    """

    def __init__(self, sock: socket.socket, token: bytes) -> None:
        self.sock = sock
        self.number: int | None = None
        self._token = token
        self._incoming = bytearray()

    def send(self, message: bytes) -> bool:
        """Send it to a worker that waits for it; say whether there is one. From any thread, as long as it is open."""
        frame = _LENGTH.pack(len(message)) + message
        try:
            with contextlib.suppress(BlockingIOError):
                self.sock.recv(1, socket.MSG_PEEK)
                return False  # it has nothing to say, so it has hung up
            if self.sock.send(frame) == len(frame):
                return True
        except OSError:
            return False
        self.hang_up()  # and so it does not get the half of it
        return False

    def hang_up(self) -> None:
        """Let the worker go; from any thread."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def read(self, buffer: memoryview) -> list[bytes]:
        """The messages that are whole.

        Raises:
            OSError: there will be no more, or they are not from a worker of ours.
        """
        try:
            n = self.sock.recv_into(buffer)
        except BlockingIOError:
            return []
        if not n:
            raise ConnectionResetError
        incoming = self._incoming
        incoming += buffer[:n]
        if self.number is None:
            token = incoming[:_TOKEN_BYTES]
            if not hmac.compare_digest(token, self._token[: len(token)]):
                raise ConnectionRefusedError
            if len(incoming) < _TOKEN_BYTES + _NUMBER.size:
                return []
            (self.number,) = _NUMBER.unpack_from(incoming, _TOKEN_BYTES)
            del incoming[: _TOKEN_BYTES + _NUMBER.size]
        messages = []
        while len(incoming) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(incoming)
            end = _LENGTH.size + length
            if len(incoming) < end:
                break
            messages.append(bytes(incoming[_LENGTH.size : end]))
            del incoming[:end]
        return messages

    def close(self) -> None:
        self.hang_up()  # whoever was forked may have it open too
        self.sock.close()


def _set_up(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * LONGEST)


# -- the worker's end -------------------------------------------------------------------------------------------------


def connect(address: Address, number: int) -> socket.socket | None:
    """A line to the main program, for the task of this number; None if there is no way."""
    port, token = address
    try:
        sock = socket.create_connection((_HOST, port), _CONNECT_TIMEOUT)
        _set_up(sock)
        sock.sendall(token + _NUMBER.pack(number))
    except OSError:
        return None
    return sock


def send(sock: socket.socket, message: bytes) -> None:
    """Raises ``OSError`` if nobody gets it."""
    sock.sendall(_LENGTH.pack(len(message)) + message)


def receive(sock: socket.socket, timeout: float) -> bytes | None:
    """The next message; None if there is none within so many seconds, or ever."""
    sock.settimeout(timeout)
    incoming = b""
    try:
        while len(incoming) < _LENGTH.size or len(incoming) < _LENGTH.size + _LENGTH.unpack_from(incoming)[0]:
            data = sock.recv(_LENGTH.size + LONGEST)
            if not data:
                return None
            incoming += data
    except OSError:
        return None
    return incoming[_LENGTH.size :]
