"""UnpicklingThread: opens the values that came from workers as pickles, one after the other, without any lock.

::

    scheduler ──event with a pickle──▶ queue ──▶ thread ──the same event with its value──▶ scheduler
                                                   └─ takes too long: Failed ──────────────▶

Unpickling runs code of the user's classes, which may do anything. A value that takes too long costs its job; the thread
that it keeps is left behind, and another one goes on with the next value.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from evalkit.backends.events import Done, DonePickled, Event, Failed, Recorded, RecordedPickled
from evalkit.backends.execution import failed
from evalkit.engine.clock import Clock
from evalkit.job import ErrorInfo, JobCause
from evalkit.usercode import describe_error

__all__ = ["UnpicklingThread"]

_log = logging.getLogger("evalkit")

_PAUSE = 0.5  # seconds before another try to start the thread


class UnpicklingThread:
    """Opens the pickles in events, in the order in which they came.

    Args:
        deliver: ``deliver(event, opened)`` is called with each event and with what has become of it.
        timers: tell when one takes too long.
        limit: seconds that one may take.
    """

    def __init__(self, deliver: Callable[[Event, Event], None], timers: Clock, limit: float) -> None:
        self._deliver = deliver
        self._timers = timers
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Event, Event | None]] = deque()  # with what has become of it, if that is known
        self._to_do: SimpleQueue[bool] = SimpleQueue()  # whether there may be something, or it is the end
        self._thread: threading.Thread | None = None
        self._opening: _Opening | None = None
        self._is_watched = False

    def put(self, event: Event) -> None:
        """Have an event opened and delivered; one without a pickle is delivered in its turn. Does not wait."""
        with self._lock:
            self._waiting.append((event, None))
            if self._thread is None:
                self._start_thread()
        self._to_do.put(True)

    def close(self) -> None:
        """Deliver nothing more."""
        with self._lock:
            self._waiting.clear()
        self._to_do.put(False)

    def _start_thread(self) -> None:
        """With the lock: have another thread work on what waits."""
        self._thread = None
        thread = threading.Thread(target=self._serve, name="evalkit-unpickling", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread to give now
            self._timers.call_later(_PAUSE, self._try_again)
        else:
            self._thread = thread

    def _try_again(self) -> None:
        with self._lock:
            if self._thread is None and self._waiting:
                self._start_thread()

    def _serve(self) -> None:
        while self._to_do.get():
            with self._lock:
                if not self._waiting:
                    continue
                event, opened = self._waiting.popleft()
            if opened is None:
                self._opening = opening = _Opening(event)
                self._watch(self._limit)
                opened = _open(event)
                if not opening.claim():
                    return  # it was given up, and another thread goes on
                self._opening = None
            try:
                self._deliver(event, opened)
            except Exception:  # noqa: BLE001 - a defect of ours; the next ones are delivered
                _log.exception("an event of job %s was not taken in", event.job_id)

    def _watch(self, delay: float) -> None:
        if not self._is_watched:
            self._is_watched = True
            self._timers.judge_later(delay, self._check)

    def _check(self) -> None:
        """Give up what takes too long. Called by the timers, for as long as there is something to look after."""
        self._is_watched = False
        opening = self._opening
        if opening is None:
            return
        left = opening.since + self._limit - time.monotonic()
        if left > 0:
            self._watch(left)
        elif opening.claim():
            self._opening = None
            with self._lock:
                self._waiting.appendleft((opening.event, _too_late(opening.event, self._limit)))
                self._start_thread()
            self._to_do.put(True)
            # A loop in Python ends by this; whatever else keeps the thread keeps it.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(opening.thread), ctypes.py_object(SystemExit))


class _Opening:
    """A pickle that a thread opens now. The thread or the timers say what has become of it: who claims it first."""

    def __init__(self, event: Event) -> None:
        self.event = event
        self.since = time.monotonic()
        self.thread = threading.get_ident()
        self._claim = [True]

    def claim(self) -> bool:
        # No lock: an exception may be raised anywhere in a thread that was given up.
        try:
            return self._claim.pop()
        except IndexError:
            return False


def _open(event: Event) -> Event:
    """The event with its value; or what it is for the job that the value cannot be had."""
    if isinstance(event, DonePickled):
        try:
            return Done(event.job_id, event.output.load(), event.measured, event.worker)
        except BaseException as exc:  # noqa: BLE001 - a user's __setstate__ may do anything
            exc.add_note("The output of the job could not be rebuilt from what the worker sent.")
            return failed(event.job_id, exc, event.measured, event.worker)
    if isinstance(event, RecordedPickled):
        try:
            return Recorded(event.job_id, event.values.load())
        except BaseException as exc:  # noqa: BLE001 - as above; a record does not fail the job
            return _not_recorded(event.job_id, describe_error(exc))
    return event


def _too_late(event: Event, limit: float) -> Event:
    said = f"it took longer than output_timeout={limit:g} s to rebuild, in the main program, what the worker sent"
    if isinstance(event, DonePickled):
        error = ErrorInfo("OutputTimeout", said)
        return Failed(event.job_id, JobCause.EXCEPTION, error, event.measured, event.worker)
    return _not_recorded(event.job_id, said)


def _not_recorded(job_id: str, why: str) -> Recorded:
    return Recorded(job_id, {"evalkit_error": f"these values could not be rebuilt: {why}"})
