"""The connection between the main process and a worker: a pair of sockets that nobody else has.

::

    main process ──chunks, numbers of the runs that are to stop──▶ worker
                 ◀──answers, and before them what the jobs say────

Each message has a kind and a length before it. What comes first is read first, so what a worker says of its jobs is
known before its answer, and before its death.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading

__all__ = ["Connection", "Kind", "MessageReader", "frame"]

_HEAD = struct.Struct("<BQ")  # kind and length, before each message
_TOGETHER = 2**16  # bytes; a shorter message is copied behind its head
_READ_BYTES = 2**18


class Kind:
    """The kinds of messages."""

    CHUNK = 0  # to run
    STOP = 1  # the number of a run, 8 bytes
    READY = 2  # the process id, in digits
    ANSWER = 3  # the outcome of a chunk
    FAILURE = 4  # the exception with which a chunk ended
    MESSAGE = 5  # of the side channel


def frame(kind: int, message: bytes) -> list[bytes]:
    """Return the parts in which a message is sent."""
    head = _HEAD.pack(kind, len(message))
    return [head + message] if len(message) < _TOGETHER else [head, message]


class MessageReader:
    """Reads messages from a socket, for one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._incoming = bytearray()
        self._received = memoryview(bytearray(_READ_BYTES))  # one for all: a new one for each read is slow to get

    def read(self, flags: int = 0) -> bool:
        """Read once; return whether more may be there already.

        Raises:
            BlockingIOError: there is nothing, and the socket or the flags say not to wait.
            EOFError: the other end is closed.
            OSError: the connection is broken.
        """
        n = self._sock.recv_into(self._received, 0, flags)
        if not n:
            raise EOFError
        self._incoming += self._received[:n]
        return n == _READ_BYTES

    def cut(self) -> tuple[int, bytes] | None:
        """Return the kind and the content of the first message, or None if it has not arrived in full."""
        incoming, start = self._incoming, _HEAD.size
        if len(incoming) < start:
            return None
        kind, length = _HEAD.unpack_from(incoming)
        if len(incoming) < start + length:
            return None
        message = bytes(memoryview(incoming)[start : start + length])
        del incoming[: start + length]
        return kind, message


class Connection:
    """The main process' end. It never waits to send: what the worker does not take at once is sent when the worker
    reads, by the thread that receives.

    Attributes:
        theirs: the worker's end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outgoing: list[memoryview] = []
        self._is_closed = False
        self._pidfd: int | None = None
        self._sock, self.theirs = socket.socketpair()
        self._sock.setblocking(False)
        self._reader = MessageReader(self._sock)
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._poll = select.poll()
        for sock in (self._sock, self._woken):
            self._poll.register(sock, select.POLLIN)

    def send(self, kind: int, message: bytes) -> None:
        """Send it, now or later; or never, if the worker has gone."""
        with self._lock:
            if self._is_closed:
                return
            self._outgoing += map(memoryview, frame(kind, message))
            self._write()
            if self._outgoing:
                self._do_wake()

    def watch(self, pid: int) -> None:
        """Take the death of this process for the end of the connection, where the system can tell: a fork of it may
        hold the other end open.
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

    def receive(self) -> tuple[int, bytes]:
        """Wait for the next message, for one thread alone; return its kind and its content.

        Raises:
            EOFError: there will be none.
        """
        while (message := self._reader.cut()) is None:
            if not self._wait():
                continue
            try:
                self._reader.read()
            except BlockingIOError:
                continue
            except OSError as exc:
                raise EOFError(str(exc)) from exc
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
