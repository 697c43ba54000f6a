"""Meter: what the runs of a worker take, in time, in CPU time and in memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

from evalkit.backends.base import RunFunction
from evalkit.backends.events import Done, Failed, Measured, WorkerIdentity
from evalkit.backends.execution import failed
from evalkit.running import RunningJob

__all__ = ["Meter"]

_SHORT = 0.001  # seconds; the peak memory is not asked for after runs that take less
_CLOSE = 50e-6  # seconds between two runs, at most, for the CPU time after the one to do as that before the other
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Meter:
    """Measures the runs of one worker, one after the other. Asking the system takes longer than a short run, so the CPU
    time is asked for once a run where they follow closely, and the peak memory after some runs only.

    Args:
        cpu_time: the clock of CPU time: of this thread, or where a run may have threads, of this process.
    """

    __slots__ = ("_clock", "_cpu", "_end", "_peak")

    def __init__(self, cpu_time: Callable[[], float] = time.thread_time) -> None:
        self._clock = cpu_time
        self._peak = _PeakMemory()
        self._cpu = 0.0
        self._end = 0.0  # of the last run

    def pause(self) -> None:
        """The next run may be in another thread."""
        self._end = 0.0

    def run(self, function: RunFunction, job: RunningJob, worker: WorkerIdentity | None) -> Done | Failed:
        """Call the run function in this thread. Whatever it raises is an event, SystemExit included."""
        start = time.time()
        cpu = self._cpu if 0.0 <= start - self._end < _CLOSE else self._clock()
        try:
            output = function(job)
        except BaseException as exc:  # noqa: BLE001 - a failed job is a result
            return failed(job.id, exc, self._measured(start, cpu), worker)
        return Done(job.id, output, self._measured(start, cpu), worker)

    def _measured(self, start: float, cpu: float) -> Measured:
        self._cpu = now = self._clock()
        self._end = end = time.time()
        return (start, end, now - cpu, self._peak.bytes if end - start < _SHORT else self._peak.ask())


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
