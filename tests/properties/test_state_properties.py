"""The machine of states, whatever is asked of it in whatever order."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
from bounds import bounded
from faketime import fake_time
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedBackend

from evalkit import ErrorInfo, Evaluator, JobCause, JobState
from evalkit.backends import Cancelled, Done, Event, Failed, Lost, Progress, Recorded, Started
from evalkit.errors import IllegalTransitionError
from evalkit.job import LEGAL_TRANSITIONS, TERMINAL_STATES, Job

states = st.sampled_from(JobState)
times = st.floats(-1e9, 1e9) | st.sampled_from([0.0, -0.0, float("inf"), float("-inf")])


class _Owner:
    """Holds a job, with a clock that shows whatever the test says: clocks of machines are set back."""

    epoch = 100.0

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def cancel_job(self, job: Job) -> Any:
        raise NotImplementedError

    def wait_job(self, job: Job, timeout: float | None) -> bool:
        raise NotImplementedError


def _consistent(job: Job) -> None:
    status = job.status
    said = [status.waiting, status.running, status.success, status.failed, status.canceled, status.unknown]
    assert sum(said) == (status.state is not JobState.PRUNED)
    assert status.completed == (status.state in TERMINAL_STATES)
    assert status.completed or not (status.success or status.failed or status.canceled)
    assert (job.is_waiting, job.is_running, job.is_complete) == (status.waiting, status.running, status.completed)
    assert (job.is_success, job.is_failed, job.state) == (status.success, status.failed, status.state)
    assert status.duration >= 0
    assert status.running_time >= 0
    assert 0 <= status.progress <= 1
    assert status.progress == 1 or not status.success


steps = st.one_of(
    st.tuples(st.just("move"), states),
    st.tuples(st.just("finish"), states),
    st.tuples(st.just("start"), times),
    st.tuples(st.just("retry"), st.none()),
    st.tuples(st.just("progress"), st.floats(0, 1)),
)


@bounded(300)
@given(st.lists(steps, max_size=12), st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_whatever_is_asked_only_legal_transitions_happen_and_terminal_states_are_final(
    asked: list[tuple[str, Any]], created: float, now: float
) -> None:
    owner = _Owner()
    job = Job("0.0", {}, created=created, owner=owner)
    owner.now = now
    for what, value in asked:
        before, attempt, output = job.state, job.attempt, job.output
        try:
            if what == "move":
                job.move(value)
            elif what == "finish":
                if value not in TERMINAL_STATES:
                    continue
                job.finish(value, output=object())
            elif what == "start":
                job.start(value)
            elif what == "retry":
                job.retry(JobCause.CRASH, ErrorInfo("WorkerDied", "it died"))
            else:
                job.note_progress(value, "on")
        except IllegalTransitionError:
            assert (job.state, job.attempt, job.output) == (before, attempt, output)
        else:
            assert job.state in LEGAL_TRANSITIONS[before] or (job.state is before and what in ("progress", "start"))
            assert before not in TERMINAL_STATES or job.state is before
        _consistent(job)


@bounded(300)
@given(st.text(max_size=20) | st.sampled_from(JobState).map(str))
def test_every_spelling_reads_as_some_state(text: str) -> None:
    state = JobState.parse(text)
    assert JobState.parse(state.value) is state
    for other in (text.lower(), text.upper(), f"  {text}\n", text.replace("_", "-"), text.replace("_", " ")):
        if other.upper() == text.upper() or other.strip() == text.strip() or "_" in text:
            assert JobState.parse(other) is state


def _messages(job_id: str) -> dict[str, Event]:
    error = ErrorInfo("Crashed", "by the test")
    return {
        "started": Started(job_id, 1000.0),
        "progress": Progress(job_id, 0.5, "on"),
        "recorded": Recorded(job_id, {"x": 1}),
        "done": Done(job_id, 1),
        "failed": Failed(job_id, JobCause.CRASH, error),
        "cancelled": Cancelled(job_id),
        "lost": Lost(job_id, "gone"),
    }


@pytest.mark.parametrize("order", list(permutations(["started", "done", "failed", "cancelled"])), ids="-".join)
def test_whatever_the_order_of_messages_the_first_end_is_the_only_one(order: tuple[str, ...]) -> None:
    _in_order([*order, "recorded", "progress", *order])


@bounded(100)
@given(st.lists(st.sampled_from(list(_messages(""))), max_size=30))
def test_whatever_messages_come_there_is_one_end_at_most(order: list[str]) -> None:
    _in_order(order)


def _in_order(order: list[str]) -> None:
    with fake_time() as time:
        backend = ScriptedBackend(1, time, inline=False, prompt=True, deep=0)
        with Evaluator(lambda job: None, backend) as evaluator:
            (job,) = evaluator.submit([{}])
            ended: tuple[Any, ...] | None = None
            losses = 0
            for what in order:
                backend.send(_messages(job.id)[what])
                losses += what == "lost"
                _consistent(job)
                if ended is None and what in ("done", "failed", "cancelled"):
                    assert job.state == {"done": "DONE", "failed": "FAILED", "cancelled": "CANCELLED"}[what]
                    ended = (job.state, job.output, job.error, job.cause, job.attempt, job.records, job.metadata)
                if ended is not None:
                    now = (job.state, job.output, job.error, job.cause, job.attempt, job.records, job.metadata)
                    assert now == ended
            assert job.is_complete == (ended is not None or losses > 10)
            if job.is_complete:
                assert evaluator.gather("ALL") == [job]
                assert evaluator.gather("ALL") == []
