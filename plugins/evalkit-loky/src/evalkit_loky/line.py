"""Line: the connection to a worker process, as the main process has it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from multiprocessing.connection import Connection

__all__ = ["Line"]

_LENGTH = struct.Struct("!i")  # before each message, as multiprocessing.connection has it; -1 for a long one,
_LONG = struct.Struct("!Q")  # with this after it
_LONGEST = 0x7FFFFFFF
_TOGETHER = 2**16  # bytes; a shorter message is copied behind its length
_READ_BYTES = 2**18


class Line:
    """Who sends never waits: what the worker does not take at once goes when it reads, from the thread that receives.

    Attributes:
        theirs: the worker's end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outgoing: list[memoryview] = []
        self._incoming = bytearray()
        self._received = memoryview(bytearray(_READ_BYTES))  # one for all: a new one for each read is slow to get
        self._is_closed = False
        self._pidfd: int | None = None
        self._sock, theirs = socket.socketpair()
        self.theirs = Connection(theirs.detach())
        self._sock.setblocking(False)
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._poll = select.poll()
        for sock in (self._sock, self._woken):
            self._poll.register(sock, select.POLLIN)

    def send(self, message: bytes) -> None:
        """Send it, now or later; or never, if the worker has gone."""
        head = _LENGTH.pack(len(message)) if len(message) <= _LONGEST else _LENGTH.pack(-1) + _LONG.pack(len(message))
        with self._lock:
            if self._is_closed:
                return
            if len(message) < _TOGETHER:
                self._outgoing.append(memoryview(head + message))
            else:
                self._outgoing += [memoryview(head), memoryview(message)]
            self._write()
            if self._outgoing:
                self._do_wake()

    def watch(self, pid: int) -> None:
        """Take the death of this process for the end of the line, where the system can tell: a fork of it may hold the
        other end open.
        """
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or it has gone and loky has noticed
            self._pidfd = os.pidfd_open(pid)
            self._poll.register(self._pidfd, select.POLLIN)

    def hang_up(self) -> None:
        """Send nothing more; what has been said by now can still be received."""
        with self._lock, contextlib.suppress(OSError):
            self._outgoing.clear()
            if not self._is_closed:
                self._sock.shutdown(socket.SHUT_RDWR)

    def receive(self) -> bytes:
        """Wait for the next message, for one thread alone.

        Raises:
            EOFError: there will be none.
        """
        while (message := self._cut()) is None:
            if not self._wait():
                continue
            try:
                n = self._sock.recv_into(self._received)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise EOFError(str(exc)) from exc
            if not n:
                raise EOFError
            self._incoming += self._received[:n]
        return message

    def close(self) -> None:
        """Release everything; called by the thread that receives."""
        with self._lock:
            self._is_closed = True
            self._outgoing.clear()
            for sock in (self._sock, self._woken, self._wake):
                sock.close()
            if self._pidfd is not None:
                os.close(self._pidfd)

    def _write(self) -> None:
        """With the lock: send what there is room for."""
        try:
            while self._outgoing:
                rest = self._outgoing[0][self._sock.send(self._outgoing[0]) :]
                self._outgoing[:1] = [rest] if rest else []
        except BlockingIOError:
            return
        except OSError:  # it has gone, and who receives will see
            self._outgoing.clear()

    def _do_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b"\0")

    def _wait(self) -> bool:
        """Wait until something can be done; say whether there is something to receive."""
        self._poll.modify(self._sock, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        ready = dict(self._poll.poll())
        if self._woken.fileno() in ready:
            self._woken.recv(4096)
        events = ready.get(self._sock.fileno(), 0)
        if events & select.POLLOUT:
            with self._lock:
                self._write()
        if self._pidfd in ready:
            self.hang_up()
            return True
        return bool(events & ~select.POLLOUT)

    def _cut(self) -> bytes | None:
        """The first message, if all of it is here."""
        incoming, start = self._incoming, _LENGTH.size
        if len(incoming) < start:
            return None
        (length,) = _LENGTH.unpack_from(incoming)
        if length < 0:
            if len(incoming) < start + _LONG.size:
                return None
            (length,) = _LONG.unpack_from(incoming, start)
            start += _LONG.size
        if len(incoming) < start + length:
            return None
        message = bytes(memoryview(incoming)[start : start + length])
        del incoming[: start + length]
        return message
