"""Meter: what the runs of a worker take, in time, in CPU time and in memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from evalkit.backends.base import RunFunction
from evalkit.backends.events import Done, Failed, Measured, WorkerIdentity
from evalkit.backends.execution import describe
from evalkit.job import ErrorInfo, JobCause
from evalkit.running import RunningJob

__all__ = ["Meter", "Ran", "event_of"]

#: What a run returned; what it raised, or None; and what it took.
Ran = tuple[Any, ErrorInfo | None, Measured]

_SHORT = 0.001  # seconds; the peak memory is not asked for after runs that take less, the CPU time not more often
_BRIEF = 50e-6  # seconds, of a run or between two runs, which count as CPU time until the system is asked again
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Meter:
    """Measures the runs of one worker, one after the other.

    Asking the system takes longer than a run that does nothing. So the peak memory is asked for after some runs only,
    and the CPU time of a run of less than 50 µs is its duration. Where such runs follow each other closely, the system
    is asked once in a millisecond, which is by how much the CPU time of the next longer run may be wrong.

    A run starts at the time of day, and ends as much later as the monotonic clock says.

    Args:
        cpu_time: the clock of CPU time: of this thread, or where a run may have threads, of this process.
    """

    __slots__ = ("_clock", "_due", "_end", "_lag", "_peak")

    def __init__(self, cpu_time: Callable[[], float] = time.thread_time) -> None:
        self._clock = cpu_time
        self._peak = _PeakMemory()
        self._lag = 0.0  # of the CPU time behind the time, when the system was asked
        self._due = 0.0  # when it is to be asked again
        self._end = 0.0  # of the last run

    def pause(self) -> None:
        """The next run may be in another thread."""
        self._end = 0.0

    def run(self, function: RunFunction, job: RunningJob) -> Ran:
        """Call the run function in this thread. Whatever it raises is an error, SystemExit included."""
        told, start = time.time(), time.monotonic()
        if start - self._end >= _BRIEF:
            self._ask(start)
        lag = self._lag  # a run on serial may gather others, which are measured here as well
        try:
            output = function(job)
        except BaseException as exc:  # noqa: BLE001 - a failed job is a result
            measured = self._measured(told, start, lag)
            return None, describe(exc), measured
        return output, None, self._measured(told, start, lag)

    def _measured(self, told: float, start: float, lag: float) -> Measured:
        self._end = end = time.monotonic()
        duration = end - start
        if duration < _BRIEF:
            if end > self._due:
                self._ask(end)
            return (told, told + duration, duration, self._peak.bytes)
        self._ask(end)
        cpu_time = max(0.0, duration - (self._lag - lag))
        return (told, told + duration, cpu_time, self._peak.bytes if duration < _SHORT else self._peak.ask())

    def _ask(self, now: float) -> None:
        self._lag = now - self._clock()
        self._due = now + _SHORT


def event_of(job_id: str, ran: Ran, worker: WorkerIdentity | None) -> Done | Failed:
    """The event of a run."""
    output, error, measured = ran
    if error is None:
        return Done(job_id, output, measured, worker)
    return Failed(job_id, JobCause.EXCEPTION, error, measured, worker)


class _PeakMemory:
    """The peak resident memory of this process, as it was last asked for.

    Attributes:
        bytes: what came out.
    """

    __slots__ = ("_inherited", "bytes")

    def __init__(self) -> None:
        self._inherited = 0  # what the process had at its peak before it became this program: the memory of its parent
        peak = _peak_of_process()
        if _peak_of_program() < peak:
            self._inherited = peak
        self.bytes = self.ask()

    def ask(self) -> int:
        """Ask the system, in a microsecond mostly."""
        peak = _peak_of_process()
        self.bytes = peak if peak > self._inherited else _peak_of_program() or peak
        return self.bytes


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def _peak_of_program() -> int:
    """The same as Linux has it for the program alone, which takes ten times as long; 0 where there is no such thing."""
    try:
        with open("/proc/self/status", "rb") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith(b"VmHWM:")), 0)
    except OSError:
        return 0
