"""Watch: what a run shows of itself, counted as jobs end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from evalkit.callbacks import Callback
from evalkit.callbacks.tally import Tally, failure_kind, one_line
from evalkit.job import Job, JobState

__all__ = ["Snapshot", "Watch", "failure_example"]

_SPAN = 60.0  # seconds over which the rate is taken
_MOST_EXAMPLES = 100


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counts at one moment.

    Attributes:
        ended: jobs of this run that ended, cancelled ones aside.
        rate: jobs a second, of late.
        best: in words.
        failures: in words.
    """

    ended: int
    rate: float
    best: str
    failures: str


class Watch(Callback):
    """Counts the jobs that end; safe to read from any thread.

    Args:
        minimize: smaller objectives are better.

    Attributes:
        tally: of this run, and of what was done before it.
        best_job: the job of the best objective, if there is one objective.
        examples: for each kind of failure, what the first of them said.
    """

    def __init__(self, *, minimize: bool) -> None:
        self.tally = Tally(minimize=minimize)
        self.best_job: Job | None = None
        self.examples: dict[str, str] = {}
        self._lock = threading.Lock()
        self._before = 0
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    @property
    def ended(self) -> int:
        """Jobs of this run that ended, cancelled ones aside."""
        return self.tally.ended - self.tally.cancelled - self._before

    def on_done(self, job: Job) -> None:
        with self._lock:
            self._add(job)

    def add_before(self, job: Job) -> None:
        """Count a job that was done before this run."""
        with self._lock:
            self._before += 1
            self._add(job)

    def _add(self, job: Job) -> None:
        failures = self.tally.failures
        if self.tally.add(job) and self.tally.dimension == 1:
            self.best_job = job
        if self.tally.failures > failures:
            kind = failure_kind(job)
            if kind is not None and kind not in self.examples and len(self.examples) < _MOST_EXAMPLES:
                self.examples[kind] = failure_example(job)

    def snapshot(self) -> Snapshot:
        """The counts now; the rate needs to be asked for now and then."""
        with self._lock:
            now, ended = time.monotonic(), self.ended
            samples = self._samples
            while len(samples) > 1 and samples[1][0] < now - _SPAN:
                samples.popleft()
            since, before = samples[0]
            rate = (ended - before) / (now - since) if now > since else 0.0
            if now - samples[-1][0] >= _SPAN / 60:
                samples.append((now, ended))
            return Snapshot(ended, rate, self.tally.best_text(), self.tally.failures_text())

    def kinds(self) -> Sequence[tuple[str, int]]:
        """The kinds of failure, the most frequent first."""
        with self._lock:
            return self.tally.kinds.most_common()


def failure_example(job: Job) -> str:
    """One line on a job that failed."""
    if job.state is JobState.FAILED and job.error is not None:
        return f"job {job.id}: {one_line(str(job.error), 200)}"
    return f"job {job.id}"
