"""UnpicklingThread: opens the values that came from workers as pickles, one after the other, without any lock.

::

    scheduler ──event with a pickle──▶ queue ──▶ thread ──the same event with its value──▶ scheduler
                                                   └─ takes too long: Failed ──────────────▶

Unpickling runs code of the user's classes, which may do anything. A value that takes too long costs its job, and the
thread goes on with the next value.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from evalkit.backends.events import Done, DonePickled, Event, Failed, Recorded, RecordedPickled
from evalkit.backends.execution import failed
from evalkit.engine.clock import Clock
from evalkit.job import ErrorInfo, JobCause
from evalkit.limited import CallTimeoutError, call_within
from evalkit.usercode import describe_error

__all__ = ["UnpicklingThread"]

_log = logging.getLogger("evalkit")

_PAUSE = 0.5  # seconds before another try to start the thread


class UnpicklingThread:
    """Opens the pickles in events, in the order in which they came.

    Args:
        deliver: ``deliver(event, opened)`` is called with each event and with what has become of it.
        timers: try again to start the thread where the system has none to give.
        limit: seconds that one may take.
    """

    def __init__(self, deliver: Callable[[Event, Event], None], timers: Clock, limit: float) -> None:
        self._deliver = deliver
        self._timers = timers
        self._limit = limit
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, event: Event) -> None:
        """Have an event opened and delivered; one without a pickle is delivered in its turn. Does not wait.

        Called by one thread at a time.
        """
        self._events.put(event)
        if self._thread is None:
            self._start_thread()

    def close(self) -> None:
        """Deliver nothing more."""
        self._closed = True
        self._events.put(None)

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="evalkit-unpickling", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no thread to give now
            self._timers.call_later(_PAUSE, self._start_thread)

    def _serve(self) -> None:
        while (event := self._events.get()) is not None:
            opened = _open(event, self._limit)
            if self._closed:
                return
            try:
                self._deliver(event, opened)
            except Exception:  # noqa: BLE001 - a defect of ours; the next ones are delivered
                _log.exception("an event of job %s was not taken in", event.job_id)
            del event, opened  # until the next one comes, this thread keeps no value alive


def _open(event: Event, limit: float) -> Event:
    """The event with its value; or what it is for the job that the value cannot be had."""
    try:
        if isinstance(event, DonePickled):
            return Done(event.job_id, call_within(limit, event.output.load), event.measured, event.worker)
        if isinstance(event, RecordedPickled):
            return Recorded(event.job_id, call_within(limit, event.values.load))
    except CallTimeoutError:
        error = ErrorInfo(
            "OutputTimeout",
            f"it took longer than output_timeout={limit:g} s to rebuild, in the main program, what the worker sent",
        )
        return _not_opened(event, Failed(event.job_id, JobCause.EXCEPTION, error), error.message)
    except BaseException as exc:  # noqa: BLE001 - a user's __setstate__ may do anything
        exc.add_note("The output of the job could not be rebuilt from what the worker sent.")
        return _not_opened(event, failed(event.job_id, exc, None, None), describe_error(exc))
    return event


def _not_opened(event: Event, failure: Failed, why: str) -> Event:
    if isinstance(event, DonePickled):
        failure.measured, failure.worker = event.measured, event.worker
        return failure
    # A record does not fail the job.
    return Recorded(event.job_id, {"evalkit_error": f"these values could not be rebuilt: {why}"})
