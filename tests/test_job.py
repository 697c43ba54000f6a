"""Jobs: the machine of states, foreign spellings, objectives, results."""

from __future__ import annotations

import itertools
import math
import threading
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import pytest

from evalkit.errors import (
    IllegalTransitionError,
    JobCancelledError,
    JobFailedError,
    JobNotCompleteError,
    JobResultError,
)
from evalkit.job import (
    LEGAL_TRANSITIONS,
    TERMINAL_STATES,
    CancelOutcome,
    ErrorInfo,
    Job,
    JobCause,
    JobMetadata,
    JobState,
    WorkerIdentity,
    is_failed_objective,
    objective_of,
)
from evalkit.storage.base import JobUpdate


def job_in(state: JobState, **end: Any) -> Job:
    """A job that came to a state by legal ways."""
    job = Job("s.7", {"x": 1}, number=7, created=1.0)
    way = {
        JobState.QUEUED: [],
        JobState.RUNNING: [JobState.RUNNING],
        JobState.DONE: [JobState.RUNNING],
        JobState.FAILED: [JobState.RUNNING],
        JobState.PRUNED: [JobState.RUNNING],
        JobState.CANCELLING: [JobState.CANCELLING],
        JobState.CANCELLED: [JobState.CANCELLING],
        JobState.SUSPENDED: [JobState.SUSPENDED],
        JobState.UNKNOWN: [JobState.UNKNOWN],
    }[state]
    for step in way:
        job.start(2.0) if step is JobState.RUNNING else job.move(step, "stopped on the way")
    if state in TERMINAL_STATES:
        job.finish(state, **end)
    assert job.state is state
    return job


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), list(itertools.product(JobState, JobState)))
def test_only_legal_transitions_happen(before: JobState, after: JobState) -> None:
    job = job_in(before)
    if after in LEGAL_TRANSITIONS[before]:
        job.move(after)
        assert job.state is after
    else:
        with pytest.raises(IllegalTransitionError, match=rf"s\.7: {before} -> {after}"):
            job.move(after)
        assert job.state is before


def test_the_machine_is_the_one_that_is_documented() -> None:
    assert set(LEGAL_TRANSITIONS) == set(JobState)
    assert {state for state in JobState if not LEGAL_TRANSITIONS[state]} == TERMINAL_STATES
    assert {JobState.DONE, JobState.FAILED, JobState.PRUNED} <= LEGAL_TRANSITIONS[JobState.RUNNING]
    assert LEGAL_TRANSITIONS[JobState.CANCELLING] == {JobState.CANCELLED}
    assert JobState.DONE not in LEGAL_TRANSITIONS[JobState.QUEUED]


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_terminal_states_are_final(state: JobState) -> None:
    job = job_in(state)
    for end in TERMINAL_STATES:
        with pytest.raises(IllegalTransitionError):
            job.finish(end)
    with pytest.raises(IllegalTransitionError):
        job.start(3.0)
    with pytest.raises(IllegalTransitionError):
        job.retry(JobCause.CRASH, ErrorInfo("WorkerDied", "it died"))
    assert job.cancel() is CancelOutcome.TOO_LATE


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_a_late_end_changes_nothing_of_the_first(state: JobState) -> None:
    job = job_in(state, output=1, error=ErrorInfo("E", "first"), cause=JobCause.CRASH)
    with pytest.raises(IllegalTransitionError):
        job.finish(JobState.DONE, output=2)
    assert (job.state, job.output, job.cause) == (state, 1, JobCause.CRASH)


@pytest.mark.parametrize(
    ("spelling", "state"),
    [
        *((state.value, state) for state in JobState),
        *((state.value.lower(), state) for state in JobState),
        ("WAITING", JobState.QUEUED),
        ("pending", JobState.QUEUED),
        ("Submitted", JobState.QUEUED),
        ("started", JobState.RUNNING),
        ("SUCCESS", JobState.DONE),
        ("completed", JobState.DONE),
        ("ERROR", JobState.FAILED),
        ("crashed", JobState.FAILED),
        ("CANCELED", JobState.CANCELLED),
        ("cancel requested", JobState.CANCELLING),
        ("Cancel-Requested", JobState.CANCELLING),
        ("CANCEL_REQUESTED", JobState.CANCELLING),
        (" done \n", JobState.DONE),
        ("", JobState.UNKNOWN),
        ("out to lunch", JobState.UNKNOWN),
    ],
)
def test_foreign_spellings(spelling: str, state: JobState) -> None:
    assert JobState.parse(spelling) is state


PREDICATES = {
    JobState.QUEUED: {"waiting"},
    JobState.SUSPENDED: {"waiting"},
    JobState.RUNNING: {"running"},
    JobState.CANCELLING: {"running"},
    JobState.DONE: {"completed", "success"},
    JobState.FAILED: {"completed", "failed"},
    JobState.PRUNED: {"completed"},
    JobState.CANCELLED: {"completed", "canceled"},
    JobState.UNKNOWN: {"unknown"},
}


@pytest.mark.parametrize("state", list(JobState))
def test_predicates(state: JobState) -> None:
    job = job_in(state)
    names = ("waiting", "running", "completed", "success", "failed", "canceled", "unknown")
    assert {name for name in names if getattr(job.status, name)} == PREDICATES[state]
    on_job = {"is_waiting": "waiting", "is_running": "running", "is_complete": "completed"}
    on_job |= {"is_success": "success", "is_failed": "failed"}
    for name, same in on_job.items():
        assert getattr(job, name) is getattr(job.status, same)


def test_a_status_never_changes() -> None:
    job = job_in(JobState.QUEUED)
    before = job.status
    job.start(2.0)
    job.note_progress(0.5, "half")
    assert (before.state, before.progress, before.start_timestamp, before.running_time) == (JobState.QUEUED, 0, None, 0)
    after = job.status
    assert (after.progress, after.phase, after.start_timestamp) == (0.5, "half", 2.0)
    with pytest.raises(AttributeError):
        after.progress = 1.0  # type: ignore[misc]
    job.finish(JobState.DONE, told=5.0)
    assert (job.status.duration, job.status.running_time, job.status.progress) == (4.0, 3.0, 1.0)


def test_another_attempt_starts_anew_and_keeps_the_records() -> None:
    job = job_in(JobState.RUNNING)
    job.note_progress(0.5, "half")
    job.note_record({"step": 1})
    job.retry(JobCause.CRASH, ErrorInfo("WorkerDied", "it died"))
    assert (job.state, job.attempt, job.status.progress, job.status.phase) == (JobState.QUEUED, 1, 0.0, "")
    assert job.records == [{"step": 1}]
    assert "timestamp_start" not in job.metadata


def test_callbacks_of_the_end_are_handed_out_once() -> None:
    job = job_in(JobState.RUNNING)
    seen: list[Job] = []
    job.when_complete(seen.append)
    for callback in job.finish(JobState.DONE):
        callback(job)
    assert seen == [job]
    later: list[Job] = []
    job.when_complete(later.append)
    assert (seen, later) == ([job], [job])


def test_who_asks_after_the_end_is_called_at_once() -> None:
    job = job_in(JobState.DONE)
    seen: list[Job] = []
    job.when_complete(seen.append)
    assert seen == [job]


def test_callbacks_that_race_with_the_end_are_called_exactly_once() -> None:
    for _ in range(200):
        job = job_in(JobState.RUNNING)
        seen: list[Job] = []
        together = threading.Barrier(2)

        def register(job: Job = job, seen: list[Job] = seen, together: threading.Barrier = together) -> None:
            together.wait()
            for _ in range(5):
                job.when_complete(seen.append)

        thread = threading.Thread(target=register)
        thread.start()
        together.wait()
        for callback in job.finish(JobState.DONE):
            callback(job)
        thread.join()
        assert len(seen) == 5


def test_a_run_that_does_not_count_leaves_nothing() -> None:
    job = job_in(JobState.RUNNING)
    job.note_record({"step": 0})
    job.retry(JobCause.CRASH, ErrorInfo("WorkerDied", "it died"))
    job.start(3.0)
    job.note_record({"step": 1})
    job.note_progress(0.5, "half way")
    job.rerun()
    assert (job.state, job.attempt, job.records) == (JobState.QUEUED, 1, [{"step": 0}])
    assert (job.status.progress, job.status.start_timestamp) == (0.0, None)


def test_what_a_run_that_does_not_count_had_recorded_is_not_stored() -> None:
    job = job_in(JobState.RUNNING)
    assert JobUpdate.of(job).records is None
    job.note_record({"step": 0})
    job.rerun()
    assert JobUpdate.of(job).records == []


# -- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "objective"),
    [
        (1, 1),
        (1.5, 1.5),
        (0, 0),
        (-math.inf, -math.inf),
        (Fraction(1, 3), Fraction(1, 3)),
        ((1, 2.0), (1, 2.0)),
        ([1, 2.0], (1, 2.0)),
        ("F_oom", "F_oom"),
        ({"objective": 2}, 2),
        ({"objective": [1, 2]}, (1, 2)),
        ({"objective": "F_x", "metadata": {}}, "F_x"),
        (MappingProxyType({"objective": 2}), 2),
        ({"objective": None}, None),
        ({"loss": 2}, None),
        ({"objective": {"objective": 2}}, None),
        ("word", None),
        ("f_lower", None),
        ("", None),
        ((), None),
        ([], None),
        ((1, "2"), None),
        (None, None),
        (object, None),
        (b"F_x", None),
    ],
)
def test_what_the_objective_is(output: Any, objective: Any) -> None:
    assert objective_of(output) == objective


@pytest.mark.parametrize(
    ("objective", "failed"),
    [
        (1.0, False),
        pytest.param(10**400, False, id="huge"),
        (Fraction(1, 3), False),
        (True, False),
        (None, False),
        ("F_", True),
        ("F_oom", True),
        (math.nan, True),
        (math.inf, True),
        (-math.inf, True),
        ((1.0, 2), False),
        ((1.0, math.nan), True),
        (("F_x", 1.0), True),
        ((1.0, 10**400), False),
        (1 + 2j, False),
    ],
)
def test_what_a_failed_objective_is(objective: Any, failed: bool) -> None:
    assert is_failed_objective(objective) is failed


def test_numpy_scalars_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert objective_of(numpy.float32(1.5)) == 1.5
    assert objective_of({"objective": numpy.int64(3)}) == 3
    assert is_failed_objective(numpy.float64("nan"))
    assert is_failed_objective(numpy.float32("inf"))
    assert not is_failed_objective(numpy.int64(3))


# -- results ----------------------------------------------------------------------------------------------------------


def test_the_result_of_a_job_that_is_done() -> None:
    job = job_in(JobState.DONE, output={"objective": 2, "metadata": {"epochs": 3}})
    assert job.get_results() == job.result() == job.output
    assert (job.objective, job.objective_failed, job.metadata["epochs"]) == (2, False, 3)


def test_the_result_of_a_job_that_failed() -> None:
    job = job_in(
        JobState.FAILED, error=ErrorInfo("ValueError", "too hot", "Traceback: line 3"), cause=JobCause.EXCEPTION
    )
    for read in (job.get_results, job.result):
        with pytest.raises(
            JobFailedError, match=r"(?s)s\.7 failed \(EXCEPTION\): ValueError: too hot.*line 3"
        ) as caught:
            read()
        assert caught.value.job is job
        assert isinstance(caught.value, JobResultError)


@pytest.mark.parametrize(
    ("state", "reason"), [(JobState.CANCELLED, "stopped on the way"), (JobState.PRUNED, "no reason given")]
)
def test_the_result_of_a_job_that_was_ended_early(state: JobState, reason: str) -> None:
    job = job_in(state, output="kept")
    with pytest.raises(JobCancelledError, match=reason):
        job.get_results()
    assert job.output == "kept"


@pytest.mark.parametrize("state", sorted(set(JobState) - TERMINAL_STATES))
def test_the_result_of_a_job_that_has_not_ended(state: JobState) -> None:
    job = job_in(state)
    with pytest.raises(JobNotCompleteError, match=str(state)):
        job.get_results()
    with pytest.raises(JobNotCompleteError, match="no evaluator"):
        job.result(timeout=0.01)


def test_records_and_metadata_are_copies() -> None:
    job = job_in(JobState.RUNNING)
    job.note_record({"step": 1})
    job.records.append({"step": 2})
    job.metadata["pid"] = 3
    assert job.records == [{"step": 1}]
    assert "pid" not in job.metadata


def test_metadata_shows_what_is_known() -> None:
    metadata = JobMetadata(1.0)
    assert dict(metadata) == {"timestamp_submit": 1.0, "attempt": 0}
    metadata.timestamp_start, metadata.timestamp_end = 2.0, 4.5
    metadata.ran_by = WorkerIdentity("node7", 7, "process-0")
    metadata.extra = {"epochs": 3, "pid": "mine"}
    assert metadata["duration"] == 2.5
    assert metadata["pid"] == "mine"
    assert len(metadata) == len(list(metadata)) == len(set(metadata))
    with pytest.raises(KeyError):
        metadata["extra"]
    with pytest.raises(KeyError):
        metadata["cpu_time"]
    assert dict(JobMetadata.of(dict(metadata))) == dict(metadata)


def test_what_a_storage_kept_comes_back() -> None:
    first = job_in(JobState.FAILED, error=ErrorInfo("E", "m"), cause=JobCause.TIMEOUT)
    first.measured.ran_by = WorkerIdentity("node7", 7, "process-0")
    job = Job("s.7", {"x": 1})
    job.restore(JobState.FAILED, None, first.error, first.cause, 2, [{"step": 1}], first.metadata)
    assert (job.state, job.error, job.cause, job.attempt) == (JobState.FAILED, ErrorInfo("E", "m"), JobCause.TIMEOUT, 2)
    assert (job.records, job.metadata["host"]) == ([{"step": 1}], "node7")


def test_how_jobs_and_errors_are_shown() -> None:
    assert repr(job_in(JobState.QUEUED)) == "Job('s.7', QUEUED, args={'x': 1})"
    assert repr(job_in(JobState.DONE, output=3)) == "Job('s.7', DONE, args={'x': 1}, output=3)"
    assert "error=E: m" in repr(job_in(JobState.FAILED, error=ErrorInfo("E", "m")))
    assert str(ErrorInfo("E", "")) == "E"
