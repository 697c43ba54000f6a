"""A worker as the pool sees it: its socket, its tokens, and the tasks it holds in order."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
from collections import deque

from evalkit.backends.base import Task
from evalkit.backends.events import WorkerIdentity
from evalkit.backends.process.capture import create, excerpt
from evalkit.backends.process.outbox import OutboxReader
from evalkit.backends.process.wire import NUMBERS, Frame, FrameReader, Kind, frame
from evalkit.backends.serialization import Packer
from evalkit.errors import SerializationError
from evalkit.job import ErrorInfo, JobCause
from evalkit.joblog import JobLog
from evalkit.running import are_plain

__all__ = ["WorkerLink"]

_BATCH_BYTES = 256 * 1024
_LARGE = 4096  # bytes from which on the size of a task counts
_MAX_BUFFERS = 64  # in one sendmsg


class WorkerLink:
    """One worker. All but ``read`` is called with the pool's lock held.

    Args:
        number: see below.
        capture: whether what its jobs print is captured.

    Attributes:
        number: of the worker, never used twice.
        inflight: the tasks it holds, in order; the first may be running.
        running_since: when the first of them started, on the monotonic clock; None while it holds none.
        identity: who it is; None until it is ready.
        given: how many tasks it was ever given.
        doomed: the id of the job because of which it is being killed.
        retiring: it gets no more tasks, and ends after the last.
        resources: what the jobs that it runs have to themselves, from its first such job to its end.
        born: when it was started, on the monotonic clock.
        listens_for_room: whether the crew waits for room in its socket.
        unreached: whether it had gone when its first task was sent, so that nobody has started that.
        fault: why it is given up, if that is for what it has sent.
        looked_at: when what it holds back was looked for, if it has said nothing of the end of a job since.
    """

    def __init__(self, number: int, *, capture: bool = False) -> None:
        self.number = number
        self.inflight: deque[Task] = deque()
        self.running_since: float | None = None
        self.identity: WorkerIdentity | None = None
        self.given = 0
        self.doomed: str | None = None
        self.retiring = False
        self.resources: dict[str, str] | None = None
        self.inflight_bytes = 0
        self.listens_for_room = False
        self.unreached = False
        self.looked_at: float | None = None
        self.fault: tuple[JobCause, ErrorInfo] | None = None
        self.born = time.monotonic()
        self._sizes: dict[str, int] = {}  # of the large ones
        self._generation = 0
        self.sock, self.their_sock = socket.socketpair()
        self.sock.setblocking(False)
        self._token_read, self._token_write = os.pipe()
        os.set_blocking(self._token_read, False)
        os.set_blocking(self._token_write, False)
        self._reader = FrameReader(self.sock)
        self._outbox = OutboxReader()
        self._next = 0  # the number of its next message
        self._out: deque[memoryview] = deque()
        self._log_fd = create() if capture else None
        self._log_end = 0  # of the last job that has ended

    @property
    def fds_for_worker(self) -> list[int]:
        fds = [self.their_sock.fileno(), self._token_read, self._outbox.fd]
        return fds if self._log_fd is None else [*fds, self._log_fd]

    @property
    def ready(self) -> bool:
        """Whether it can be given tasks."""
        return self.identity is not None and not self.retiring and self.doomed is None

    @property
    def wants_write(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._out)

    # -- sending --------------------------------------------------------------------------------------------------

    def send(self, kind: int, value: object) -> None:
        """Send a small message."""
        self._queue(frame(kind, pickle.dumps(value, 5)))
        self.flush()

    def send_parts(self, parts: list[bytes | memoryview]) -> None:
        """Send a message that is a frame already."""
        self._queue(parts)
        self.flush()

    def bind(self, resources: dict[str, str]) -> None:
        """Every task from here on has these resources."""
        if self.resources is None:
            self.resources = resources
            self.send(Kind.RESOURCES, resources)

    def give(self, tasks: list[Task]) -> list[tuple[Task, SerializationError]]:
        """Send tasks; return those that do not pickle, with why."""
        held = len(self.inflight)
        bad = [] if self._queue_plain(tasks) else self._queue_each(tasks)
        accepted = len(self.inflight) - held
        self.given += accepted
        if accepted and held == 0:
            self.move_on()
        # Nothing is before the first task of an idle worker, so it starts at once; it needs no token.
        tokens = accepted if held else accepted - 1
        if tokens > 0:
            os.write(self._token_write, bytes((self._generation,)) * tokens)
        first = self._out[0] if accepted and held == 0 else None
        has_gone = not self.flush()
        self.unreached |= has_gone and first is not None and self._out[0] is first
        return bad

    def _queue_plain(self, tasks: list[Task]) -> bool:
        """Send tasks whose arguments are nothing but small scalars in one pickle; say whether they are.

        Anything else gets a pickle of its own: what two jobs share here, they must not share there.
        """
        if not are_plain([task.args for task in tasks]):
            return False
        data = pickle.dumps([(task.id, task.attempt, task.args) for task in tasks], 5)
        if len(data) > _BATCH_BYTES:
            return False
        self._queue(frame(Kind.TASKS, data, (), not self.inflight))
        self.inflight.extend(tasks)
        return True

    def _queue_each(self, tasks: list[Task]) -> list[tuple[Task, SerializationError]]:
        """Send tasks, each in a pickle of its own; return those that do not pickle, with why."""
        bad: list[tuple[Task, SerializationError]] = []
        pack = Packer("args").pack
        granted = not self.inflight
        small: list[tuple[str, int, bytes]] = []
        small_bytes = 0
        for task in tasks:
            try:
                data, buffers = pack(task.args)
            except SerializationError as exc:
                bad.append((task, exc))
                continue
            size = len(data)
            if buffers or size >= _BATCH_BYTES or small_bytes >= _BATCH_BYTES:
                granted = self._queue_small(small, granted)
                small, small_bytes = [], 0
            if buffers or size >= _BATCH_BYTES:
                payload = pickle.dumps((task.id, task.attempt, data), 5)
                self._queue(frame(Kind.LARGE_TASK, payload, buffers, granted))
                granted = False
                size += sum(buffer.nbytes for buffer in buffers)
            else:
                small.append((task.id, task.attempt, data))
                small_bytes += size
            self.inflight.append(task)
            if size > _LARGE:
                self._sizes[task.id] = size
                self.inflight_bytes += size
        self._queue_small(small, granted)
        return bad

    def _queue_small(self, tasks: list[tuple[str, int, bytes]], granted: bool) -> bool:
        if not tasks:
            return granted
        self._queue(frame(Kind.TASKS, pickle.dumps(tasks, 5), (), granted))
        return False

    def _queue(self, parts: list[bytes | memoryview]) -> None:
        self._out.extend(memoryview(part) for part in parts)

    def flush(self) -> bool:
        """Write what the socket takes; the rest waits until it is writable. Return False if the worker has gone."""
        out = self._out
        try:
            while out:
                parts = [out[index] for index in range(min(len(out), _MAX_BUFFERS))]
                sent = self.sock.sendmsg(parts) if len(parts) > 1 else self.sock.send(parts[0])
                while out and sent >= out[0].nbytes:
                    sent -= out.popleft().nbytes
                if sent:
                    out[0] = out[0][sent:]
        except BlockingIOError:
            return True
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    # -- taking back ----------------------------------------------------------------------------------------------

    def take_back(self) -> list[Task]:
        """Take back every task that the worker has not started, in order."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._token_read, 65536):
                count += len(chunk)
        if not count:
            return []
        tasks = [self.inflight.pop() for _ in range(count)]
        if self._sizes:
            self.inflight_bytes -= sum(self._sizes.pop(task.id, 0) for task in tasks)
        self.given -= count
        self._generation = (self._generation + 1) % 256
        self.send(Kind.DROP, (count, self._generation))
        tasks.reverse()
        return tasks

    # -- receiving ------------------------------------------------------------------------------------------------

    def read(self) -> list[Frame]:
        """What has arrived; raises ``EOFError`` and ``BlockingIOError`` as :meth:`FrameReader.read`."""
        return self._unheard(self._reader.read())

    def read_outbox(self, *, last: bool) -> list[Frame]:
        """The results that it has not sent yet; none if something is on its way that comes before them.

        Args:
            last: whether nothing more comes through the socket.
        """
        frames = self._outbox.read()
        heard = sum(not self._is_new(one) for one in frames)  # they are in order, and each is there once
        if not last and frames[heard:] and frames[heard][1] != self._next:
            return []
        return self._unheard(frames)

    def _unheard(self, frames: list[Frame]) -> list[Frame]:
        """Without those that were read in the outbox, or sent twice."""
        end = self._next + len(frames)
        if end < NUMBERS and [one[1] for one in frames] == list(range(self._next, end)):
            self._next = end
            return frames
        new = []
        for one in frames:
            if self._is_new(one):
                new.append(one)
                self._next = (one[1] + 1) % NUMBERS
        return new

    def _is_new(self, one: Frame) -> bool:
        return (one[1] - self._next) % NUMBERS < NUMBERS // 2

    def finish_first(self) -> str:
        """Its first task has ended; return its id. Call :meth:`move_on` after the last of a round."""
        job_id = self.inflight.popleft().id
        if self._sizes:
            self.inflight_bytes -= self._sizes.pop(job_id, 0)
        return job_id

    def move_on(self) -> None:
        """The task that is the first now, if any, has just started."""
        self.looked_at = None
        self.running_since = time.monotonic() if self.inflight else None

    # -- what its jobs print --------------------------------------------------------------------------------------

    def take_log(self, payload: bytes | bytearray) -> JobLog:
        """The log of the first task, which the worker has sent."""
        log: JobLog
        self._log_end, log = pickle.loads(payload)
        return log

    def read_log(self) -> JobLog | None:
        """What the first task has printed by now."""
        if self._log_fd is None:
            return None
        return excerpt(self._log_fd, self._log_end, os.fstat(self._log_fd).st_size)

    # -- the end --------------------------------------------------------------------------------------------------

    def close_theirs(self) -> None:
        """The worker has its own copy of its end by now."""
        self.their_sock.close()
        self._outbox.close_theirs()

    def close(self) -> None:
        self.sock.close()
        self.their_sock.close()
        os.close(self._token_read)
        os.close(self._token_write)
        self._outbox.close()
        if self._log_fd is not None:
            os.close(self._log_fd)
