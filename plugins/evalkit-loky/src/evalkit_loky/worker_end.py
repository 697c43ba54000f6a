"""WORKER_END: the connection to the main process, as the worker has it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque

from evalkit.backends import SideChannelClient
from evalkit_loky.connection import Kind, MessageReader, frame

__all__ = ["WORKER_END", "WorkerEnd"]

_POLL = 0.001  # seconds; asking the socket takes as long as several jobs that do nothing


class WorkerEnd(SideChannelClient):
    """Receives chunks and requests to stop, and sends answers and what jobs say meanwhile. There is one in a process.

    The thread that runs chunks, those of its job and the ticker may all use it at once. In a fork of the worker nobody
    may: the connection is its parent's.
    """

    def __init__(self) -> None:
        self._pid = 0  # of the process that has the connection
        self._sending = threading.Lock()
        self._reading = threading.Lock()
        self._cut_off = False
        self._polled = 0.0
        self._gone = False  # the main process has
        self._stops: set[int] = set()
        self._chunks: deque[bytes] = deque()

    def __reduce__(self) -> str:
        return "WORKER_END"  # that of the process which unpickles it

    def open(self, sock: socket.socket) -> None:
        """Use this connection, in a worker."""
        self._sock = sock
        self._reader = MessageReader(sock)
        self._pid = os.getpid()

    # -- the loop of the worker -----------------------------------------------------------------------------------

    def next_chunk(self) -> bytes:
        """Wait for the next chunk.

        Raises:
            EOFError: there will be none.
            OSError: the connection is broken.
        """
        with self._reading:
            if not self._chunks:
                self._stops.clear()  # a request comes after the chunk of its run, so these were for earlier ones
            while not self._chunks:
                self._reader.read()
                self._sort()
            return self._chunks.popleft()

    def answer(self, kind: int, message: bytes) -> None:
        """Send a message, in full.

        Raises:
            OSError: the connection is broken.
        """
        with self._sending:
            if self._cut_off:
                raise ConnectionError("a message to the main process was cut off")
            self._cut_off = True  # unless all of it is sent: a signal handler of the job's may raise meanwhile
            for part in frame(kind, message):
                self._sock.sendall(part)
            self._cut_off = False

    # -- the side channel -----------------------------------------------------------------------------------------

    def send(self, message: bytes) -> None:
        if os.getpid() != self._pid:
            raise ConnectionError("this process is a fork of a worker, or none, and has no connection")
        self.answer(Kind.MESSAGE, message)

    def stop_requested(self, run: int) -> bool:
        now = time.monotonic()
        if now - self._polled >= _POLL and not self._gone:
            self._polled = now
            # A thread that does not get the lock need not read: another one reads.
            if os.getpid() == self._pid and self._reading.acquire(blocking=False):
                try:
                    self._poll()
                finally:
                    self._reading.release()
        return self._gone or run in self._stops

    def _poll(self) -> None:
        """With the lock: read what has arrived."""
        try:
            while self._reader.read(socket.MSG_DONTWAIT):
                continue
        except (EOFError, ConnectionError):
            self._gone = True
        except OSError:  # there is nothing; or a job has closed the descriptor, and nothing is heard any more
            pass
        self._sort()

    def _sort(self) -> None:
        """With the lock: keep what has been read for whoever asks for it."""
        while message := self._reader.cut():
            kind, content = message
            if kind == Kind.CHUNK:
                self._chunks.append(content)
            else:
                self._stops.add(int.from_bytes(content, "little"))


WORKER_END = WorkerEnd()
