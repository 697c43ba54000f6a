"""The outbox of a worker: results that it has not sent yet, in memory that it shares with the pool.

::

    worker ──put──▶ outbox ──contents, in one send──▶ socket ──▶ pool
                       └─────── read, if the worker dies or goes quiet ──▶

A send takes as long as a few jobs that do nothing, so results that follow each other closely share one. What is in
here is not lost with the worker, and not held up by the next job, whatever that does.
"""

from __future__ import annotations

import mmap
import os
import tempfile

from evalkit.backends.process.wire import NUMBER_BYTES, Frame, number_into, small_frames
from evalkit.metadata import Measured

__all__ = ["SMALL", "TOGETHER", "Outbox", "OutboxReader"]

SMALL = 4096  #: bytes of a result that may wait
TOGETHER = 64  #: results that wait, at most
_SIZE = 2 * TOGETHER * SMALL  # what nobody has written to takes no memory
_START = 8  # before it is where the contents end; eight bytes, which a memoryview writes at once


class Outbox:
    """The worker's end.

    Attributes:
        held: how many results are in it.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _SIZE)
        os.close(fd)
        self._ends = memoryview(self._memory).cast("Q")
        self._end = _START
        self.held = 0

    def put(self, frame: bytes) -> None:
        """Add a result."""
        end = self._end + len(frame)
        self._memory[self._end : end] = frame
        self._end = self._ends[0] = end  # only now is it there
        self.held += 1

    def put_number(self, value: float, measured: Measured, tag: int) -> None:
        """Add a result that is a number."""
        number_into(self._memory, self._end, value, measured, tag)
        self._end = self._ends[0] = self._end + NUMBER_BYTES
        self.held += 1

    def contents(self) -> bytes:
        """All of it, as it goes through the socket."""
        return self._memory[_START : self._end]

    def clear(self) -> None:
        """It was sent."""
        self._end = self._ends[0] = _START
        self.held = 0


class OutboxReader:
    """The pool's end.

    Attributes:
        fd: of the memory, for the worker.
    """

    def __init__(self) -> None:
        self.fd = _open_memory()
        self._memory = mmap.mmap(self.fd, _SIZE)
        self._ends = memoryview(self._memory).cast("Q")
        self._ends[0] = _START

    def read(self) -> list[Frame]:
        """What is in it; none if the worker empties it meanwhile, since it is on its way then."""
        end = self._ends[0]
        data = self._memory[_START:end]
        first = data[:_START]  # with the number of the message
        if self._ends[0] < end or self._memory[_START : _START + len(first)] != first:
            return []
        return small_frames(data)

    def close_theirs(self) -> None:
        """The worker has its own copy of the descriptor by now."""
        os.close(self.fd)

    def close(self) -> None:
        self._ends.release()
        self._memory.close()


def _open_memory() -> int:
    try:
        fd = os.memfd_create("evalkit-outbox", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, _SIZE)
    return fd
