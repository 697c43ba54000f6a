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
import struct

from evalkit.backends.process.wire import Frame, small_frames

__all__ = ["Outbox", "OutboxReader"]

#: One number, so that it changes at once: | results before the first in it 44 | bytes in it 20 |
_STATE = struct.Struct("@Q")
_RESULT = 1 << 20
_SIZE = 2**16


class Outbox:
    """The worker's end.

    Attributes:
        held: how many results are in it.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _SIZE)
        os.close(fd)
        self._state = 0
        self._end = _STATE.size
        self.held = 0

    def put(self, frame: bytes) -> bool:
        """Add a result; say whether there was room for it."""
        start, end = self._end, self._end + len(frame)
        if end > _SIZE:
            return False
        self._memory[start:end] = frame
        self._end = end
        self._state += len(frame)
        _STATE.pack_into(self._memory, 0, self._state)  # only now is it there
        self.held += 1
        return True

    def pass_by(self) -> None:
        """A result goes its way without having been in here. Only while there is none in it."""
        self._state += _RESULT

    def contents(self) -> bytes:
        """All of it, as it goes through the socket."""
        return self._memory[_STATE.size : self._end]

    def clear(self) -> None:
        """It was sent."""
        self._state = (self._state // _RESULT + self.held) * _RESULT
        _STATE.pack_into(self._memory, 0, self._state)
        self._end = _STATE.size
        self.held = 0


class OutboxReader:
    """The pool's end.

    Attributes:
        fd: of the memory, for the worker.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("evalkit-outbox", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _SIZE)
        self._memory = mmap.mmap(self.fd, _SIZE)

    def read(self) -> tuple[int, list[Frame]]:
        """How many results were before the first that is in it, and those that are in it.

        If the worker empties it meanwhile, they are on their way: it is then as if there were none.
        """
        (state,) = _STATE.unpack_from(self._memory)
        data = self._memory[_STATE.size : _STATE.size + state % _RESULT]
        (after,) = _STATE.unpack_from(self._memory)
        before = state // _RESULT
        return before, small_frames(data) if after // _RESULT == before else []

    def close_theirs(self) -> None:
        """The worker has its own copy of the descriptor by now."""
        os.close(self.fd)

    def close(self) -> None:
        self._memory.close()
