"""What jobs print: a file in memory for each worker, cut into the logs of its jobs.

::

    worker: descriptors 1 and 2 ──append──▶ | earlier jobs | the job that runs … |
                                              given back     head  (given back)  tail

Descriptors, not ``sys.stdout``: what comes from C and from the children of a job is there too. The file grows at its
end only. After each job, the worker asks for its size, one cheap system call; if the job printed, its beginning and
end are sent before its result. So a job's log is whatever was written between the end of the job before it and its
own end. When a worker dies, the pool reads what its last job had printed.

A pipe would bound what a job prints by making it wait, but somebody would have to empty it while the interpreter of the
worker is held by C code, and to tell where one job ends and the next begins. A file never makes a job wait. Its bound
is kept by the nursery, which gives the memory of the middle back to the system (a hole in the file; offsets stay as
they are, so it need not agree with anybody on when): ten times a second, more often while a job prints a lot.

Linux only. Elsewhere, what jobs print goes where the output of the program goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import io
import mmap
import os
import struct
import sys
import time
from typing import Any, TextIO

from evalkit.joblog import JobLog

__all__ = ["HEAD", "TAIL", "Capture", "Trimmer", "can_capture", "create", "excerpt", "flush_all"]

HEAD = TAIL = 32 * 1024  # bytes that are kept of the beginning and of the end of what a job prints
_SLACK = 1 << 20  # bytes before the end of the file that are not given back, so that whoever reads the tail finds it
_CALM, _BUSY = 0.1, 0.02  # seconds between two looks of the nursery; busy is when a file has grown by more than _SLACK
_START = struct.Struct("=q")
_PUNCH_HOLE_KEEP_SIZE = 3
_IONBF = 2

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
if _libc is not None:
    _libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def can_capture() -> bool:
    """Whether this system has what it takes."""
    if _libc is None:
        return False
    try:
        os.close(create())
    except (AttributeError, OSError):  # an old system, or a sandbox that forbids it
        return False
    return True


def create() -> int:
    """A new file in memory, which every write lengthens; closed by who called this."""
    fd = os.memfd_create("evalkit-log", os.MFD_CLOEXEC)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    return fd


def excerpt(fd: int, start: int, end: int) -> JobLog:
    """What is kept of the bytes from ``start`` to ``end``."""
    if start > end:
        start = 0  # a program opened /dev/stdout anew, as in `> /dev/stdout`, which empties a file
    if end - start <= HEAD + TAIL:
        return JobLog(_read(fd, start, end))
    return JobLog(_read(fd, start, start + HEAD), end - start - HEAD - TAIL, _read(fd, end - TAIL, end))


def _read(fd: int, start: int, end: int) -> bytes:
    return os.pread(fd, end - start, start)


class Capture:
    """The worker's side.

    Args:
        fd: the file.
        cell: memory shared with the nursery, which says where the log of the present job starts.

    Attributes:
        fd: the file.
        end: where the log of the last job ended.
        stdout, stderr: what they are in ``sys`` when a job starts. Ours hold nothing back, so that nothing is lost when
            the worker dies, and nothing is printed twice when it forks.
        buffered: whether ``worker_init`` has replaced them.
    """

    def __init__(self, fd: int, cell: mmap.mmap) -> None:
        self.fd = fd
        self.end = 0
        self._cell = cell
        flush_all()
        self.stdout: TextIO = _Unbuffered(1)
        self.stderr: TextIO = _Unbuffered(2)
        sys.stdout = sys.__stdout__ = self.stdout  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = self.stderr  # type: ignore[misc]
        self.buffered = False

    def begin(self) -> None:
        """From now on, what is printed is a job's."""
        flush_all()
        self.buffered = sys.stdout is not self.stdout or sys.stderr is not self.stderr
        self.stdout, self.stderr = sys.stdout, sys.stderr
        assert _libc is not None  # noqa: S101 - can_capture() said so
        _libc.fflush(None)
        # C holds nothing back either.
        for name in ("stdout", "stderr"):
            with contextlib.suppress(ValueError):  # a libc where these are no symbols
                _libc.setvbuf(ctypes.c_void_p.in_dll(_libc, name), None, _IONBF, ctypes.c_size_t(0))
        os.dup2(self.fd, 1)
        os.dup2(self.fd, 2)
        if not faulthandler.is_enabled():
            faulthandler.enable(2)  # a job that crashes says where

    def restore(self) -> None:
        """What a job has made of its streams is not for the next one."""
        sys.stdout, sys.stderr = self.stdout, self.stderr

    def take(self, end: int) -> tuple[int, JobLog]:
        """The log of the job that has just ended, now that the file has grown to ``end``."""
        log = excerpt(self.fd, self.end, end)
        self.end = end
        return end, log

    def release(self) -> None:
        """What was taken is on its way; its memory may be given back."""
        _START.pack_into(self._cell, 0, self.end)


class _Unbuffered(io.TextIOWrapper):
    """A stream on a descriptor that is not ours to close."""

    def __init__(self, fd: int) -> None:
        raw: Any = io.FileIO(fd, "w", closefd=False)
        super().__init__(raw, encoding="utf-8", errors="backslashreplace", write_through=True)

    def close(self) -> None:
        """A job that closes it would close it for all that follow."""


def flush_all() -> None:
    """Write what Python holds back of what was printed, whatever the user has made of its streams."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S112 - closed, or none, or what its author made of it
            continue


class Trimmer:
    """The nursery's side: gives back the memory of what is not kept.

    Attributes:
        due: when to :meth:`look` next, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.due = 0.0
        self._files: dict[int, _File] = {}

    def __len__(self) -> int:
        return len(self._files)

    def add(self, pid: int, fd: int, cell: mmap.mmap) -> None:
        """Look after the file of a worker; it is closed in the end."""
        self._files[pid] = _File(fd, cell)

    def remove(self, pid: int) -> None:
        """The worker has ended."""
        file = self._files.pop(pid, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        """Let go of all of them, as a fork that has nothing to do with them."""
        for pid in list(self._files):
            self.remove(pid)

    def look(self) -> None:
        """Give back what can be given back."""
        busy = False
        for file in self._files.values():
            busy |= file.trim()
        self.due = time.monotonic() + (_BUSY if busy else _CALM)


class _File:
    def __init__(self, fd: int, cell: mmap.mmap) -> None:
        self._fd = fd
        self._cell = cell
        self._kept_from = 0  # what is before this was given back
        self._hole_to = 0  # and what is between the head of the present job and this

    def trim(self) -> bool:
        """Give back what can be given back; return whether that was much."""
        size = os.fstat(self._fd).st_size
        (start,) = _START.unpack_from(self._cell, 0)
        much = False
        if start - self._kept_from > _SLACK:
            self._kept_from = self._punch(self._kept_from, start)
            much = True
        hole, end = max(start + HEAD, self._hole_to), size - TAIL - _SLACK
        if end - hole > _SLACK:
            self._hole_to = self._punch(hole, end)
            much = True
        return much

    def _punch(self, start: int, end: int) -> int:
        """Give back from ``start`` to about ``end``; return to where, which is the beginning of a page."""
        assert _libc is not None  # noqa: S101 - can_capture() said so
        end -= end % mmap.PAGESIZE
        _libc.fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, start, end - start)
        return end

    def close(self) -> None:
        os.close(self._fd)
        self._cell.close()
