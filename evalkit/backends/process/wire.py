"""Frames on the socket between the pool and a worker.

::

    | kind 1 | pad 1 | tag 2 | buffers n 4 | payload length 8 | n x (length 8) | payload | buffer … |

A payload is a pickle; the buffers are the large arrays that it refers to, sent from and received into their own memory.
Only a result that is a float or an int is no pickle, since packing five numbers takes a third of the time.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from evalkit.metadata import Measured

__all__ = [
    "NUMBERS",
    "NUMBER_BYTES",
    "Frame",
    "FrameReader",
    "Kind",
    "done_parts",
    "frame",
    "is_number",
    "number_into",
    "pack_measured",
    "read_done",
    "read_measured",
    "small_frame",
    "small_frames",
]

_HEADER = struct.Struct("<BxHIQ")
_LENGTH = struct.Struct("<Q")
_CHUNK = 256 * 1024


class Kind(IntEnum):
    """What a frame is about."""

    # pool -> worker
    SETUP = 0  # what to run and how
    TASKS = 1  # [(id, attempt, args), ...], with args as they are, or pickled
    LARGE_TASK = 2  # (id, attempt, args), with buffers
    STOP = 3  # id: ask this job to stop
    DROP = 4  # (n, generation): forget the last n tasks
    QUIT = 5
    RESOURCES = 13  # {kind: unit}: of all tasks that follow
    # worker -> pool
    READY = 6  # pid
    UNFIT = 7  # ErrorInfo: the worker cannot start
    STARTED = 16  # when a job started, on the clock of the system and the monotonic one; only if there is a job_timeout
    ENDED = 17  # measured: a job has returned, and its output follows; only if there is a job_timeout
    DONE = 8  # (output, measured), the output being a plain value
    DONE_PICKLED = 18  # measured and a pickled output: see done_parts
    FAILED = 9  # (ErrorInfo, measured)
    PROGRESS = 10  # (progress, phase)
    RECORD = 11  # values
    LOG = 12  # (where it ended in the file, JobLog): what the job printed; before its result
    DONE_FLOAT = 14  # (output, measured), not pickled: 8 bytes for each number
    DONE_INT = 15


_DONE, _FLOAT, _INT = int(Kind.DONE), int(Kind.DONE_FLOAT), int(Kind.DONE_INT)
#: After the header: the output, start, end, CPU time, peak memory.
_NUMBER_FRAMES = {_FLOAT: struct.Struct(_HEADER.format + "ddddQ"), _INT: struct.Struct(_HEADER.format + "qdddQ")}
NUMBER_BYTES = _NUMBER_FRAMES[_INT].size

_MEASURED = struct.Struct("<dddQ")  # start, end, CPU time, peak memory

#: What comes from a worker is numbered, modulo this.
NUMBERS = 2**16

#: (kind, tag, payload, buffers); a plain tuple, since there is one for each result. The tag says to a worker whether
#: the first task needs no token; that from a worker is the number of the message. The payload is bytes; what a frame of
#: a number holds is read already.
Frame = tuple[int, int, Any, tuple[memoryview, ...]]


def frame(
    kind: int, payload: bytes, buffers: Sequence[bytes | memoryview] = (), tag: int = 0
) -> list[bytes | memoryview]:
    """The parts of a frame, in the order in which they go on the wire."""
    if not buffers and len(payload) < _CHUNK:
        # One small copy is cheaper than one more buffer in the system call.
        return [small_frame(kind, payload, tag)]
    head = _HEADER.pack(kind, tag, len(buffers), len(payload))
    return [head + b"".join(_LENGTH.pack(memoryview(buffer).nbytes) for buffer in buffers), payload, *buffers]


def small_frame(kind: int, payload: bytes, tag: int = 0) -> bytes:
    """A frame in one piece, without buffers."""
    return _HEADER.pack(kind, tag, 0, len(payload)) + payload


def small_frames(data: bytes) -> list[Frame]:
    """The frames in some bytes, which are whole and have no buffers."""
    frames: list[Frame] = []
    start = 0
    while start < len(data):
        kind, tag, _, length = _HEADER.unpack_from(data, start)
        if kind in _NUMBER_FRAMES:
            start = _read_numbers(frames, kind, memoryview(data), start, len(data))
            continue
        body = start + _HEADER.size
        start = body + length
        frames.append((kind, tag, data[body:start], ()))
    return frames


def pack_measured(measured: Measured) -> bytes:
    """The payload of ENDED."""
    return _MEASURED.pack(*measured)


def read_measured(payload: bytes) -> tuple[float, float, float, int]:
    """The inverse of :func:`pack_measured`."""
    return _MEASURED.unpack(payload)


def done_parts(
    measured: Measured, data: bytes, buffers: Sequence[memoryview], small: int
) -> tuple[bytes, list[bytes | memoryview]]:
    """The payload and the buffers of DONE_PICKLED.

    What was measured comes before the pickle if that has no buffers and the two are smaller than ``small``: a copy is
    cheaper then than another buffer. Otherwise it is the first buffer.
    """
    packed = _MEASURED.pack(*measured)
    if not buffers and len(packed) + len(data) < small:
        return packed + data, []
    return data, [packed, *buffers]


def read_done(
    payload: bytes, buffers: Sequence[memoryview]
) -> tuple[tuple[float, float, float, int], bytes | memoryview, Sequence[memoryview]]:
    """The inverse of :func:`done_parts`: what was measured, the pickle, and its buffers."""
    if not buffers:
        return _MEASURED.unpack_from(payload), memoryview(payload)[_MEASURED.size :], ()
    return _MEASURED.unpack(buffers[0]), payload, buffers[1:]


def is_number(value: Any) -> bool:
    """Whether a result is a number that :func:`number_into` can write."""
    return type(value) is float or (type(value) is int and -(2**63) <= value < 2**63)


def number_into(memory: Any, start: int, value: float, measured: Measured, tag: int) -> None:
    """Write the frame of a result that is a number into a writable buffer, where it takes ``NUMBER_BYTES``."""
    kind = _FLOAT if type(value) is float else _INT
    _NUMBER_FRAMES[kind].pack_into(memory, start, kind, tag, 0, NUMBER_BYTES - _HEADER.size, value, *measured)


def _read_numbers(frames: list[Frame], kind: int, view: memoryview, start: int, end: int) -> int:
    """Read the frames of one kind of numbers that follow each other; return where the last whole one ends."""
    whole = (end - start) // NUMBER_BYTES * NUMBER_BYTES
    records = _NUMBER_FRAMES[kind].iter_unpack(view[start : start + whole])
    for one, tag, _, _, value, begin, finish, cpu_time, peak in records:
        if one != kind:
            break
        frames.append((_DONE, tag, (value, (begin, finish, cpu_time, peak)), ()))
        start += NUMBER_BYTES
    return start


class FrameReader:
    """Cuts what arrives on a socket into frames; large ones are received into memory of their own, without a copy.

    Args:
        sock: a stream socket; whether a read waits is up to the flags given to :meth:`read`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(_CHUNK)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._large: _LargeFrame | None = None

    def read(self, flags: int = 0) -> list[Frame]:
        """Read once and return the frames that are whole by now; none if more has to come.

        Args:
            flags: for ``recv``, such as ``socket.MSG_DONTWAIT``.

        Raises:
            EOFError: the other side is gone.
            BlockingIOError: there is nothing to read, and the read was not to wait.
        """
        if self._large is not None:
            if not self._large.receive(self._sock, flags):
                return []
            done, self._large = self._large.frame(), None
            return [done]
        if self._end == _CHUNK:
            self._compact()
        n = self._sock.recv_into(self._view[self._end :], 0, flags)
        if n == 0:
            raise EOFError
        self._end += n
        return self._cut()

    def _cut(self) -> list[Frame]:
        frames: list[Frame] = []
        buffer, view, start, end = self._buffer, self._view, self._start, self._end
        header_size, unpack = _HEADER.size, _HEADER.unpack_from
        while end - start >= header_size:
            kind, tag, count, length = unpack(view, start)
            if kind in _NUMBER_FRAMES:
                begin, start = start, _read_numbers(frames, kind, view, start, end)
                if start == begin:
                    break
                continue
            body = start + header_size
            if count == 0 and length <= end - body:
                start = body + length
                frames.append((kind, tag, buffer[body:start], ()))
                continue
            lengths_end = body + count * _LENGTH.size
            if count == 0 and length <= _CHUNK - header_size:
                break  # it fits, once the rest is here
            if lengths_end > end:
                break  # the lengths of its buffers are not here yet; a frame has few of them
            lengths = [length, *(_LENGTH.unpack_from(view, at)[0] for at in range(body, lengths_end, _LENGTH.size))]
            self._large = _LargeFrame(kind, tag, lengths)
            taken = self._large.take(view[lengths_end:end])
            start = lengths_end + taken
            if not self._large.complete:
                break
            frames.append(self._large.frame())
            self._large = None
        self._start, self._end = start, end
        if start == end:
            self._start = self._end = 0
        elif start > _CHUNK // 2:
            self._compact()
        return frames

    def _compact(self) -> None:
        rest = self._end - self._start
        self._buffer[:rest] = self._buffer[self._start : self._end]
        self._start, self._end = 0, rest


class _LargeFrame:
    """A frame that is received into memory of its own."""

    def __init__(self, kind: int, tag: int, lengths: list[int]) -> None:
        self._kind, self._tag = kind, tag
        self._parts = [bytearray(length) for length in lengths]
        self._views = [memoryview(part) for part in self._parts]
        self._missing = [view for view in self._views if view.nbytes]

    @property
    def complete(self) -> bool:
        return not self._missing

    def take(self, data: memoryview) -> int:
        """Take the beginning of the frame from ``data``; return how many bytes were its own."""
        taken = 0
        while self._missing and taken < data.nbytes:
            n = min(self._missing[0].nbytes, data.nbytes - taken)
            self._missing[0][:n] = data[taken : taken + n]
            taken += n
            self._advance(n)
        return taken

    def receive(self, sock: socket.socket, flags: int) -> bool:
        """Receive what is there; return whether the frame is whole."""
        n = sock.recv_into(self._missing[0], 0, flags)
        if n == 0:
            raise EOFError
        self._advance(n)
        return self.complete

    def _advance(self, n: int) -> None:
        rest = self._missing[0][n:]
        if rest.nbytes:
            self._missing[0] = rest
        else:
            self._missing.pop(0)

    def frame(self) -> Frame:
        return self._kind, self._tag, self._parts[0], tuple(self._views[1:])
