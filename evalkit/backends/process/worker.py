"""The worker: takes tasks from its socket, one at a time, and writes each result as soon as there is one.

It has a single thread, so nothing here competes with the user's function. Tasks come ahead of need; before it starts
one, a worker takes a token out of a pipe that the pool can read as well. Whoever gets the token has the right to a
task, the worker to the first of those that wait, the pool to the last: so the pool can have back what was not
started, at any instant, and never is a task started by two.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from evalkit.backends.events import Measured
from evalkit.backends.execution import describe, environment
from evalkit.backends.meter import Meter
from evalkit.backends.process.capture import Capture, flush_all
from evalkit.backends.process.outbox import SMALL, TOGETHER, Outbox
from evalkit.backends.process.setup import load_setup
from evalkit.backends.process.wire import (
    NUMBERS,
    Frame,
    FrameReader,
    Kind,
    done_parts,
    frame,
    is_number,
    pack_measured,
    small_frame,
)
from evalkit.backends.serialization import Packer, loads
from evalkit.errors import SerializationError
from evalkit.job import ErrorInfo
from evalkit.running import SCALARS, RunningJob, is_coroutine_function

__all__ = ["main"]

_REPORT_INTERVAL = 0.02  # seconds; progress that comes faster is merged
_HOLD = 0.001  # seconds since the last send in which a result waits for others; the pool looks after twice that


class _Channel:
    """The channel of the job that runs."""

    def __init__(self, worker: _Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()  # the user's function may have threads that report
        self._job_id: str | None = None
        self._sent = 0.0
        self._last: tuple[float, str] | None = None
        self._held_back: threading.Event | None = None

    def begin(self, job_id: str) -> None:
        self._job_id = job_id

    def end(self) -> None:
        """What was held back goes before the result; a thread that the job left behind is not heard any more."""
        if self._last is not None:
            self._flush()
        self._job_id = None

    def progress(self, job_id: str, progress: float, phase: str) -> None:
        if job_id != self._job_id:
            return
        self._last = (progress, phase)
        if time.monotonic() - self._sent >= _REPORT_INTERVAL:
            self._flush()
            return
        if self._held_back is None:
            self._held_back = threading.Event()
            threading.Thread(
                target=self._flush_late, args=(self._held_back,), name="evalkit-reports", daemon=True
            ).start()
        self._held_back.set()

    def record(self, job_id: str, values: dict[str, Any]) -> None:
        if job_id == self._job_id:
            data, buffers = Packer("recorded values").pack(values)
            self._worker.send(Kind.RECORD, data, buffers)

    def stop_requested(self, job_id: str) -> bool:
        return self._worker.poll_stop(job_id)

    def _flush(self) -> None:
        with self._lock:
            last, self._last = self._last, None
            if last is not None and self._job_id is not None:
                self._sent = time.monotonic()
                self._worker.send(Kind.PROGRESS, pickle.dumps(last, 5))

    def _flush_late(self, held_back: threading.Event) -> None:
        """Send what came too fast, a little later: the last word of a job that then goes quiet is not lost."""
        while True:
            held_back.wait()
            held_back.clear()
            time.sleep(_REPORT_INTERVAL)
            with contextlib.suppress(OSError):
                self._flush()


class _Worker:
    def __init__(self, sock: socket.socket, tokens: int, outbox: Outbox, capture: Capture | None = None) -> None:
        self._sock = sock
        self._tokens = tokens
        self._outbox = outbox
        self._sent = 0.0  # when a result was sent last
        self._number = -1  # of the last message
        self._capture = capture
        self._reader = FrameReader(sock)
        self._tasks: deque[tuple[bool, str, int, Any]] = deque()
        self._generation = 0
        self._spare = 0  # tokens that were read for a task that turned out to need none
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._stop: set[str] = set()
        self._channel = _Channel(self)
        self._runner: asyncio.Runner | None = None
        self._args: Any = None  # of the job that is about to start
        self._meter = Meter(time.process_time)
        self._is_fork = False  # of the worker, made by the user's function: the socket is not its own
        os.register_at_fork(after_in_child=self._note_fork)
        self._state: Any = None
        self._resources: dict[str, str] | None = None
        self._packer = Packer("output")
        self._quit = False

    def _note_fork(self) -> None:
        self._is_fork = True

    # -- messages -------------------------------------------------------------------------------------------------

    def send(self, kind: int, payload: bytes, buffers: Any = ()) -> None:
        if self._is_fork:
            return
        with self._sending:
            number = self._next_number()
            self._flush()
            for part in frame(kind, payload, buffers, number):
                self._sock.sendall(part)

    def _next_number(self) -> int:
        """With the lock. An exception may come at any moment, from a signal handler of the user's: so numbers may be
        left out, and messages come twice, but no two have the same number. Nothing else leaves a number out: the pool
        takes one that is missing for a message on its way, and reads nothing behind it in the outbox.
        """
        self._number = number = (self._number + 1) % NUMBERS
        return number

    def _flush(self) -> None:
        """With the lock: send what waits."""
        if self._outbox.held:
            self._sock.sendall(self._outbox.contents())
            self._outbox.clear()

    def _send_result(self, output: Any, error: ErrorInfo | None, measured: Measured) -> None:
        """Send a result, now or, if there is more to come at once, with others. It counts from the moment on in which
        it is in the outbox, even if it cannot be sent.
        """
        if error is None and is_number(output):
            with self._sending:
                self._outbox.put_number(output, measured, self._next_number())
                self._flush_if_due()
            return
        if self._timed:
            self.send(Kind.ENDED, pack_measured(measured))  # before a large output is pickled, which may take long
        kind, payload, buffers = self._packed(output, error, measured)
        if buffers or len(payload) >= SMALL:
            self.send(kind, payload, buffers)
            self._sent = time.time()
            return
        with self._sending:
            self._outbox.put(small_frame(kind, payload, self._next_number()))
            self._flush_if_due()

    def _packed(
        self, output: Any, error: ErrorInfo | None, measured: Measured
    ) -> tuple[int, bytes, Sequence[bytes | memoryview]]:
        """The kind, payload and buffers of a result."""
        if error is None:
            if type(output) in SCALARS:
                return Kind.DONE, pickle.dumps((output, measured), 5), []
            try:
                return Kind.DONE_PICKLED, *done_parts(measured, *self._packer.pack(output), SMALL)
            except SerializationError as exc:
                error = describe(exc)
        return Kind.FAILED, pickle.dumps((error, measured), 5), []

    def _flush_if_due(self) -> None:
        """With the lock, and after what waits was put there, since the pool is to find it when it looks."""
        now = time.time()
        if not self._tasks or not 0.0 <= now - self._sent < _HOLD or self._outbox.held >= TOGETHER:
            self._flush()
            self._sent = now

    def _receive(self) -> None:
        """Wait for what the pool has to say."""
        with self._sending:
            self._flush()
        with self._receiving:
            self._take(self._reader.read())

    def _take(self, frames: list[Frame]) -> None:
        for kind, granted, payload, buffers in frames:
            if kind == Kind.TASKS:
                for index, (job_id, attempt, args) in enumerate(pickle.loads(payload)):
                    self._tasks.append((index < granted, job_id, attempt, args))
                    self._stop.discard(job_id)  # an attempt before was asked, and had returned by then
            elif kind == Kind.LARGE_TASK:
                job_id, attempt, data = pickle.loads(payload)
                self._tasks.append((bool(granted), job_id, attempt, (data, buffers)))
                self._stop.discard(job_id)
            elif kind == Kind.STOP:
                self._stop.add(pickle.loads(payload))
            elif kind == Kind.DROP:
                count, self._generation = pickle.loads(payload)
                for _ in range(count):
                    self._tasks.pop()
            elif kind == Kind.RESOURCES:
                self._resources = pickle.loads(payload)
            elif kind == Kind.QUIT:
                self._quit = True

    def poll_stop(self, job_id: str) -> bool:
        """Read what has arrived without waiting; say whether the pool asks this job to stop."""
        if self._is_fork:
            return False
        # Who does not get the lock need not read: another thread is at it.
        if self._receiving.acquire(blocking=False):
            try:
                while True:
                    self._take(self._reader.read(socket.MSG_DONTWAIT))
            except BlockingIOError:
                pass
            except (EOFError, ConnectionResetError):
                self._quit = True
            finally:
                self._receiving.release()
        return self._quit or job_id in self._stop

    # -- the loop -------------------------------------------------------------------------------------------------

    def serve(self) -> int:
        try:
            self._set_up()
            while not self._quit:
                task = self._next()
                if task is None:
                    self._receive()
                else:
                    self._work(*task)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the pool is gone
        return 0

    def _next(self) -> tuple[str, int, Any] | None:
        """The task to start now, with the right to start it; None if the pool has to say something first."""
        if not self._tasks:
            return None
        if not self._tasks[0][0]:
            if self._spare:
                self._spare -= 1
            elif not self._read_token():
                return None  # the pool took the rest back, and its DROP is on the way
        return self._tasks.popleft()[1:]

    def _read_token(self) -> bool:
        """Get the right to start the first of the tasks that wait; False if there is none to be had."""
        try:
            token = os.read(self._tokens, 1)
        except BlockingIOError:
            return False
        if not token:
            raise EOFError
        # Tokens and tasks go different ways: what this one is for, and a DROP before it, may not have arrived.
        # Several DROPs may have arrived at once: then it is older than the last of them, and the task was not dropped.
        while 0 < (token[0] - self._generation) % 256 < 128 or not self._tasks:
            self._receive()
        if self._tasks[0][0]:
            self._spare += 1  # the first is another one by now, and needs none
        return True

    def _set_up(self) -> None:
        frames = self._reader.read()
        while not frames:
            frames = self._reader.read()
        try:
            setup = load_setup(*frames[0][2:])
            self._function, self._timed = setup.run_function, setup.timed
            self._is_async = is_coroutine_function(self._function)
            if setup.worker_init is not None:
                self._state = setup.worker_init()
        except BaseException as exc:  # noqa: BLE001 - it goes to the pool, which says so to the user
            self.send(Kind.UNFIT, pickle.dumps(describe(exc), 5))
            self._quit = True
            return
        if self._capture is not None:
            self._capture.begin()
        self.send(Kind.READY, pickle.dumps(os.getpid(), 5))

    def _work(self, job_id: str, attempt: int, args: Any) -> None:
        channel, resources = self._channel, self._resources
        channel.begin(job_id)
        if resources is not None:
            os.environ.update(environment(resources))  # each time: jobs may have changed it
        if self._timed:
            self.send(Kind.STARTED, pickle.dumps((time.time(), time.monotonic()), 5))
        if type(args) is dict and not self._is_async:
            job = RunningJob(args, job_id, attempt, channel, self._state, resources)
            output, error, measured = self._meter.run(self._function, job)
        else:
            self._args = args
            job = RunningJob({}, job_id, attempt, channel, self._state, resources)
            output, error, measured = self._meter.run(self._call, job)
        if self._is_fork:
            os._exit(0 if error is None else 1)
        channel.end()
        if self._stop:
            self._stop.discard(job_id)
        self._collect_output()
        self._send_result(output, error, measured)

    def _call(self, job: RunningJob) -> Any:
        args, self._args = self._args, None
        try:
            job.parameters = _rebuilt(args)
        except BaseException as exc:
            exc.add_note("The arguments of the job could not be rebuilt in the worker.")
            raise
        if not self._is_async:
            return self._function(job)
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(self._function(job))

    def _collect_output(self) -> None:
        """What the job printed is on its way before its result is."""
        capture = self._capture
        if capture is None:
            flush_all()
            return
        if capture.buffered or sys.stdout is not capture.stdout or sys.stderr is not capture.stderr:
            flush_all()
            capture.restore()
        try:
            size = os.lseek(capture.fd, 0, os.SEEK_END)
        except OSError:
            return  # closed by the user's function
        if size != capture.end:
            self.send(Kind.LOG, pickle.dumps(capture.take(size), 5))
            capture.release()


def _rebuilt(args: Any) -> dict[str, Any]:
    """Arguments from what they travelled as."""
    if type(args) is dict:
        return args
    parameters: dict[str, Any] = pickle.loads(args) if type(args) is bytes else loads(*args)
    return parameters


def main(sock: socket.socket, tokens: int, outbox: Outbox, capture: Capture | None = None) -> int:
    """Work until the pool says QUIT or is gone; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _Worker(sock, tokens, outbox, capture).serve()
