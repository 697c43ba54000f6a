"""Many ends in one piece: to whoever does not know of it, a sequence of ``Done``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import pytest

from evalkit import Evaluator, Job, RunningJob
from evalkit.backends import Capabilities, Done, ExecutorBackend, Task, WorkerIdentity
from evalkit.backends.chunk_wire import Ends, read_ends
from evalkit.backends.done_batch import DoneBatch
from evalkit.job import JobState
from evalkit.metadata import MeasuredRuns
from evalkit.testing.backend_fixtures import BOUND, in_background

WORKER = WorkerIdentity("host", 1, "worker-1")
MEASURED = MeasuredRuns([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], [0.5, 0.25, 0.125], [10, 20, 30])


def tasks(n: int) -> list[Job]:
    return [Job(f"s.{number}", {}, number) for number in range(n)]


def test_it_is_a_sequence_of_events() -> None:
    batch = DoneBatch(tasks(3), ["a", "b", "c"], MEASURED, WORKER)
    each = [
        Done("s.0", "a", (1.0, 1.5, 0.5, 10), WORKER),
        Done("s.1", "b", (2.0, 2.5, 0.25, 20), WORKER),
        Done("s.2", "c", (3.0, 3.5, 0.125, 30), WORKER),
    ]
    assert len(batch) == 3
    assert list(batch) == each == [*batch]
    assert batch[1] == each[1]
    assert batch[-1] == each[-1]
    assert batch[1:] == each[1:]


def test_the_ends_of_jobs_that_were_abandoned_are_left_out() -> None:
    ends = Ends((0, 1, 2), ["a", "b", "c"], MEASURED)
    first, second, third = tasks(3)
    left = {0: first, 2: third}
    assert list(read_ends(left, ends, WORKER)) == [
        Done("s.0", "a", (1.0, 1.5, 0.5, 10), WORKER),
        Done("s.2", "c", (3.0, 3.5, 0.125, 30), WORKER),
    ]
    assert not left
    left = {0: first, 1: second, 2: third}
    assert [event.job_id for event in read_ends(left, ends, WORKER)] == ["s.0", "s.1", "s.2"]  # type: ignore[union-attr]
    assert not left


class Processes(ExecutorBackend):
    capabilities = Capabilities(isolates_crashes=True, by_value=True, streams=True)

    def make_executor(self) -> Executor:
        return ProcessPoolExecutor(self.num_workers, mp_context=get_context("spawn"))


def x_of(job: RunningJob) -> int:
    return int(job["x"])


def test_each_job_has_what_was_measured_of_its_own_run() -> None:
    with Evaluator(x_of, Processes(2)) as evaluator:
        for _ in range(3):  # until they travel together
            jobs = evaluator.submit([{"x": x} for x in range(300)])
            evaluator.gather("ALL")
    assert [job.output for job in jobs] == list(range(300))
    assert {job.state for job in jobs} == {JobState.DONE}
    by_worker: dict[str, list[Job]] = {}
    for job in jobs:
        known = job.metadata
        assert known["timestamp_submit"] <= known["timestamp_start"] <= known["timestamp_end"]
        assert known["timestamp_end"] <= known["timestamp_gather"]
        assert known["duration"] == known["timestamp_end"] - known["timestamp_start"]
        assert known["cpu_time"] >= 0.0
        assert known["peak_rss"] > 2**20
        assert job.has_started
        assert job.measured is job.measured, "the same once it has ended"
        by_worker.setdefault(known["worker"], []).append(job)
    for mine in by_worker.values():
        ordered = sorted(mine, key=lambda job: float(job.metadata["timestamp_start"]))
        for one, other in pairwise(ordered):
            assert one.metadata["timestamp_end"] <= other.metadata["timestamp_start"], "a worker runs one at a time"


@dataclass
class Renamed:
    """A task of a backend's own."""

    id: str
    args: dict[str, Any]
    attempt: int
    resources: dict[str, str] = field(default_factory=dict)


def renamed(task: Task) -> Task:
    return Renamed(task.id, {"x": task.args["x"], "more": 1}, task.attempt)


def changed(task: Task) -> Task:
    copied = copy.copy(task)
    copied.args.update(more=1)
    return copied


@pytest.mark.parametrize("change", [renamed, changed])
def test_a_backend_may_hand_on_tasks_of_its_own(change: Callable[[Task], Task]) -> None:
    class Handing(Processes):
        def dispatch(self, tasks: Sequence[Task]) -> None:
            super().dispatch([change(task) for task in tasks])

    with Evaluator(x_of, Handing(2)) as evaluator:
        for _ in range(3):  # until they travel together
            jobs = evaluator.submit([{"x": x} for x in range(300)])
            assert in_background(evaluator.gather, "ALL").result(BOUND) == jobs
            assert [job.output for job in jobs] == list(range(300))
