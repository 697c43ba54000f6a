"""The evaluator against a model of it, under interleavings that hypothesis makes up, in fake time."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from typing import Any

import pytest
from bounds import bounded
from faketime import FakeTime, fake_time
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model import Expected, Model
from scripted import Run, ScriptedBackend

from evalkit import Callback, ErrorInfo, Evaluator, Job, JobCause, RetryPolicy
from evalkit.backends import Cancelled, Done, Event, Failed, Lost, Progress, Recorded, Started, Task
from evalkit.errors import (
    EvaluatorClosedError,
    MaximumJobsSpawnReached,
    SearchStoppedError,
    StorageUnavailableError,
)
from evalkit.storage.memory import MemoryStorage

GRACE = 2.0
_TIMEOUT = 3.0 + 1 / 64  # seconds; no two things are ever due at the same time

small = st.integers(0, 3)
policies = st.builds(
    RetryPolicy,
    exception=st.integers(0, 1),
    crash=st.integers(0, 2),
    timeout=st.integers(0, 1),
    memory=st.integers(0, 1),
    lost=st.integers(0, 1),
    backoff=st.sampled_from([0.0, 0.5 + 1 / 128]),
)
settings_of_an_evaluator = st.fixed_dictionaries(
    {
        "num_workers": st.integers(1, 3),
        "deep": st.integers(0, 2),
        "inline": st.booleans(),
        "prompt": st.booleans(),
        "policy": policies,
        "job_timeout": st.sampled_from([None, 1.0 + 1 / 256]),
        "raises": st.booleans(),
        "acts": st.booleans(),
        "units": st.sampled_from([0, 0, 1, 2, 4]),
        "abandons": st.booleans(),
    }
)


class AwayStorage(MemoryStorage):
    """Says that it is durable, so that it is written to all the time; and may be away for some calls."""

    durable = True
    away = 0

    def __init__(self) -> None:
        super().__init__()
        self.created: list[str] = []

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise StorageUnavailableError("it is away")

    def create_jobs(self, *args: Any, **kwargs: Any) -> list[str]:
        self._answer()
        ids = super().create_jobs(*args, **kwargs)
        self.created += ids
        return ids

    def update_jobs(self, *args: Any) -> None:
        self._answer()
        super().update_jobs(*args)

    def changes(self, *args: Any) -> Any:
        self._answer()
        return super().changes(*args)


class Observer(Callback):
    """Notes what it is told, and acts on it if that is what the job is for."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.told: list[tuple[str, str]] = []

    def on_launch(self, job: Job) -> None:
        self.told.append(("launch", job.id))

    def on_done(self, job: Job) -> None:
        assert job.is_complete
        self.told.append(("done", job.id))
        if self.rig.acts:
            self.rig.react(job)

    def on_gather(self, jobs: Any) -> None:
        self.told += [("gather", job.id) for job in jobs]

    def on_close(self) -> None:
        self.told.append(("close", ""))


class Raiser(Callback):
    """Raises whatever it is told."""

    def _raise(self, *args: Any) -> None:
        raise RuntimeError("a callback that raises")

    on_launch = on_progress = on_done = on_gather = on_close = _raise


class Rig:
    """An evaluator, the backend beneath it, and the model of both."""

    def __init__(self, storage: AwayStorage, search: str, time: FakeTime, given: dict[str, Any]) -> None:
        self.time = time
        self.storage = storage
        self.peers: list[Rig] = []  # the evaluators on the same storage
        self.inline = given["inline"]
        # In the thread of the notifier, when a callback acts would be a matter of luck.
        self.acts = given["acts"] and self.inline
        self.job_timeout = given["job_timeout"]
        self.model = Model(given["policy"])
        self.maximum: int | None = None
        self.deadline: float | None = None
        self.over = False  # nothing more is taken in
        self.stopped = False
        self.backend = ScriptedBackend(
            given["num_workers"],
            time,
            inline=self.inline,
            prompt=given["prompt"],
            deep=given["deep"],
            abandons=given["abandons"],
        )
        self.units = given["units"]
        watcher = self.backend.watcher
        watcher.sent, watcher.dispatched, watcher.asked, watcher.killed = self._sent, self._take, self._ask, self._kill
        self.observer = Observer(self)
        callbacks: list[Callback] = [self.observer]
        if given["raises"]:
            callbacks.insert(0, Raiser())
        self.evaluator = Evaluator(
            lambda job: None,
            self.backend,
            callbacks=callbacks,
            storage=storage,
            search_id=search,
            job_timeout=self.job_timeout,
            retries=given["policy"],
            grace=GRACE,
            resources={"gpu": range(self.units)} if self.units else None,
        )
        time.before.append(self._tick)

    # -- what the model is told -----------------------------------------------------------------------------------

    def _sent(self, event: Event) -> None:
        self.model.sent(event, self.time.now)

    def _take(self, task: Task) -> None:
        self._know()
        self.model.dispatched(task)

    def _know(self) -> None:
        """Jobs may be dispatched before submit has returned them."""
        known = {job_id for rig in (self, *self.peers) for job_id in rig.model.jobs}
        self.model.submitted([job_id for job_id in self.storage.created if job_id not in known], None)

    def _ask(self, run: Run) -> None:
        one = self.model.jobs[run.task.id]
        if one.state == "CANCELLING":
            return
        assert self.job_timeout is not None
        assert one.since is not None
        assert self.time.now - one.since >= self.job_timeout, "asked to stop before its time"
        one.late = True

    def _kill(self, run: Run) -> None:
        assert run.asked is not None, "killed without having been asked"
        assert self.time.now - run.asked >= GRACE / 2, "killed before its grace was over"

    def _tick(self, now: float) -> None:
        if self.deadline is not None and now >= self.deadline and not self.evaluator_closed:
            self.deadline = None
            self.over = True
            self.model.cancel_all(self._goes_at_once)

    evaluator_closed = False

    def _goes_at_once(self, one: Expected) -> bool:
        run = self.backend.runs.get(one.id)
        return self.backend.prompt and run is not None and not run.running and not one.ended

    # -- what callbacks do ----------------------------------------------------------------------------------------

    def react(self, job: Job) -> None:
        what = job.args.get("then")
        if self.over:
            return  # all of them are being cancelled, and which of them were is a matter of luck
        if what == "submit":
            self.submit([{}], lazy=False)
        elif what == "cancel" and self.model.out:
            self.cancel(self.model.out[0])
        elif what == "stop":
            self.stop()

    # -- what a user does -----------------------------------------------------------------------------------------

    def submit(self, args_list: list[dict[str, Any]], lazy: bool) -> None:
        before = len(self.storage.created)
        jobs: list[Job] | None = None
        closed, over, away, n = self.evaluator_closed, self.over, self.storage.away, len(args_list)
        submitted = len(self.model.jobs)
        try:
            jobs = self.evaluator.submit(iter(args_list) if lazy else args_list)
        except EvaluatorClosedError:
            assert closed
        except MaximumJobsSpawnReached:
            assert self.maximum is not None
            assert submitted + n > self.maximum
            assert lazy or len(self.storage.created) == before
        except SearchStoppedError:
            assert over
        except StorageUnavailableError:
            assert away
        else:
            assert not closed
            assert not over or (lazy and n == 0)
            assert self.maximum is None or submitted + n <= self.maximum or n == 0
            assert len(jobs) == n
        self._know()
        if jobs is not None:
            for job, args in zip(jobs, args_list, strict=True):
                one = self.model.jobs[job.id]
                assert one.job is None or one.job is job
                one.job = job
                assert job.args == args
            numbers = [int(job.id.rpartition(".")[2]) for job in jobs]
            assert numbers == sorted(numbers)

    def cancel(self, one: Expected) -> None:
        if one.job is not None:
            expected = self.model.cancel(one)
            got = one.job.cancel()
            if expected == "REQUESTED" and one.ended:  # it went at once
                assert got in ("REQUESTED", "CANCELLED")
            else:
                assert got == expected

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = self.over = True
            self.model.cancel_all(self._goes_at_once)
        self.evaluator.stop("the test says so")

    def gather(self, type: str, size: int, seed: int) -> None:
        self.backend.rng.seed(seed)
        model, out = self.model, len(self.model.out) + len(self.model.finished)
        every = [one for one in model.jobs.values() if not one.gathered]
        if not self.inline:
            while model.out and (type == "ALL" or len(model.finished) < size):
                self.backend.act()
        order = list(model.finished)
        try:
            jobs = self.evaluator.gather(type, size)  # type: ignore[arg-type]
        except StorageUnavailableError:
            return
        ids = [job.id for job in jobs]
        if type == "ALL":
            assert ids == [one.id for one in every]
        else:
            assert len(ids) >= min(size, out)
            order = order if not self.inline else list(model.finished)
            assert ids == [one.id for one in order][: len(ids)]
            assert self.acts or len(ids) == len(order)
        model.gathered(jobs)
        records = {record.id: record for record in self.storage.load_jobs(self.evaluator.search_id, ids)}
        for job in jobs:
            record = records[job.id]
            assert (record.state, record.cause, record.output) == (job.state, job.cause, job.output)
            assert (record.attempt, record.records, record.error) == (job.attempt, job.records, job.error)
            assert record.metadata == job.metadata

    def close(self) -> None:
        out = [one.id for one in self.model.out]
        self.evaluator_closed = self.over = True
        self.model.cancel_all(self._goes_at_once)
        away = self.storage.away
        try:
            cancelled = self.evaluator.close()
        except StorageUnavailableError:
            assert away
        else:
            assert [job.id for job in cancelled] == out
            records = {record.id: record for record in self.storage.load_jobs(self.evaluator.search_id)}
            for one in self.model.jobs.values():
                assert records[one.id].is_complete
        for one in self.model.out:  # the backend was stopped under them
            self.model._end(one, one.state.CANCELLED)
        assert self.backend.stopped
        self.check()
        assert self.evaluator.close() == []
        for use in (lambda: self.evaluator.submit([{}]), lambda: self.evaluator.gather("ALL")):
            with pytest.raises(EvaluatorClosedError):
                use()
        self._check_callbacks()

    def _check_callbacks(self) -> None:
        told = self.observer.told
        assert told[-1] == ("close", "")
        for one in self.model.jobs.values():
            assert [what for what, job_id in told if job_id == one.id] == ["launch", "done", "gather"][
                : 3 if one.gathered else 2
            ]

    # -- what always holds ----------------------------------------------------------------------------------------

    def check(self) -> None:
        evaluator, model = self.evaluator, self.model
        assert evaluator.num_jobs_submitted == len(model.jobs)
        assert evaluator.num_jobs_gathered == sum(one.gathered for one in model.jobs.values())
        for one in model.jobs.values():
            assert one.dispatches <= one.attempt + 1 + one.losses
            if one.job is not None:
                one.check(one.job)
        if self.evaluator_closed:
            return
        running = self.backend.running()
        for run in running:
            if run.asked is not None:
                assert self.time.now - run.asked < GRACE + 0.01, "still alive after its grace"
            one = model.jobs[run.task.id]
            assert one.since is not None
            if self.job_timeout is not None and run.asked is None:
                assert self.time.now - one.since < self.job_timeout, "past its time, and nobody asked it to stop"
        # Fewer, where a job waits for another attempt, or for the ends of others to be stored.
        room = self.backend.capacity
        if self.units:
            self._check_resources()
            at_once = 1 if self.inline else self.backend.num_workers
            room = min(room, at_once, self.units - len(self.backend.abandoned))
        assert len(self.backend.runs) <= min(room, len(model.out))

    def _check_resources(self) -> None:
        runs = [*self.backend.runs.values(), *self.backend.abandoned]
        units = [run.task.resources["gpu"] for run in runs]
        assert len(set(units)) == len(units), "two runs have the same unit"
        for run in self.backend.runs.values():
            one = self.model.jobs[run.task.id]
            if one.job is not None:
                assert one.job.resources == run.task.resources, "it runs on one unit and records another"


class EvaluatorMachine(RuleBasedStateMachine):
    """One or two evaluators on one storage, used in every order there is."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.time = self.stack.enter_context(fake_time())
        logger = logging.getLogger("evalkit")
        self.stack.callback(setattr, logger, "disabled", logger.disabled)
        logger.disabled = True
        self.threads = set(threading.enumerate())
        self.storage = AwayStorage()
        self.search = self.storage.create_search()
        self.rigs: list[Rig] = []
        self.others: dict[int, list[str]] = {}
        self.ends: dict[str, Any] = {}

    @initialize(given=st.lists(settings_of_an_evaluator, min_size=1, max_size=2))
    def create(self, given: list[dict[str, Any]]) -> None:
        self.rigs = [Rig(self.storage, self.search, self.time, one) for one in given]
        for rig in self.rigs:
            rig.peers = self.rigs
        self.others = {place: [] for place in range(len(self.rigs))}

    def rig(self, place: int) -> Rig:
        return self.rigs[place % len(self.rigs)]

    # -- what users do --------------------------------------------------------------------------------------------

    @rule(at=small, n=st.integers(0, 4), lazy=st.booleans(), then=st.sampled_from(["", "", "submit", "cancel", "stop"]))
    def submit(self, at: int, n: int, lazy: bool, then: str) -> None:
        self.rig(at).submit([{"x": x, "then": then} for x in range(n)], lazy)

    @rule(at=small, size=st.integers(1, 3), seed=st.integers(0, 1000))
    def gather_batch(self, at: int, size: int, seed: int) -> None:
        rig = self.rig(at)
        if rig.evaluator_closed:
            return
        size = min(size, len(rig.model.out) + len(rig.model.finished)) or 1
        rig.gather("BATCH", size, seed)

    @rule(at=small, seed=st.integers(0, 1000))
    def gather_all(self, at: int, seed: int) -> None:
        rig = self.rig(at)
        if rig.evaluator_closed:
            return
        rig.gather("ALL", 1, seed)

    @rule(at=small, place=st.integers(0, 20))
    def cancel(self, at: int, place: int) -> None:
        rig = self.rig(at)
        jobs = list(rig.model.jobs.values())
        if not jobs:
            return
        rig.cancel(jobs[place % len(jobs)])

    @rule(at=small, more=st.integers(0, 3))
    def set_maximum(self, at: int, more: int) -> None:
        rig = self.rig(at)
        rig.maximum = len(rig.model.jobs) + more
        rig.evaluator.set_maximum_num_jobs_submitted(rig.maximum)

    @rule(at=small)
    def no_maximum(self, at: int) -> None:
        rig = self.rig(at)
        rig.maximum = None
        rig.evaluator.set_maximum_num_jobs_submitted(None)

    @rule(at=small, some=st.booleans())
    def set_timeout(self, at: int, some: bool) -> None:
        rig = self.rig(at)
        if rig.evaluator_closed:
            return
        rig.evaluator.timeout = _TIMEOUT if some else None
        rig.deadline = self.time.now + _TIMEOUT if some else None
        rig.over = rig.stopped

    @precondition(lambda self: len(self.rigs) > 0)
    @rule(at=small)
    def stop(self, at: int) -> None:
        rig = self.rig(at)
        if rig.evaluator_closed:
            return
        rig.stop()

    @rule(at=small)
    def gather_others(self, at: int) -> None:
        place = at % len(self.rigs)
        rig = self.rig(at)
        if rig.evaluator_closed:
            return
        try:
            jobs = rig.evaluator.gather_other_jobs_done()
        except StorageUnavailableError:
            return
        self.others[place] += [job.id for job in jobs]
        assert len(set(self.others[place])) == len(self.others[place]), "one came twice"
        expected = {
            one.id: one for other in self.rigs if other is not rig for one in other.model.jobs.values() if one.ended
        }
        assert set(self.others[place]) <= set(expected)
        assert {job_id for job_id, one in expected.items() if one.gathered} <= set(self.others[place])
        for job in jobs:
            assert (job.state, job.output) == (expected[job.id].state, expected[job.id].output)

    @rule(at=small)
    def close(self, at: int) -> None:
        rig = self.rig(at)
        if rig.evaluator_closed:
            return
        rig.close()

    # -- what happens beneath -------------------------------------------------------------------------------------

    @rule(at=small)
    def start(self, at: int) -> None:
        rig = self.rig(at)
        waiting = rig.backend.waiting()
        if waiting and len(rig.backend.running()) < rig.backend.num_workers:
            rig.backend.send(rig.backend.started(waiting[0]))

    @rule(at=small, place=small, how=st.integers(0, 6))
    def end(self, at: int, place: int, how: int) -> None:
        rig = self.rig(at)
        running = rig.backend.running()
        if running:
            rig.backend.send(rig.backend.ends(running[place % len(running)])[how])

    @rule(at=small, place=small, lost=st.booleans())
    def end_before_the_start(self, at: int, place: int, lost: bool) -> None:
        rig = self.rig(at)
        waiting = rig.backend.waiting()
        if not waiting:
            return
        job_id = waiting[place % len(waiting)].task.id
        error = ErrorInfo("SerializationError", "it does not travel")
        rig.backend.send(Lost(job_id, "gone") if lost else Failed(job_id, JobCause.EXCEPTION, error))

    @rule(at=small, place=small, progress=st.floats(0, 1))
    def report(self, at: int, place: int, progress: float) -> None:
        rig = self.rig(at)
        running = rig.backend.running()
        if not running:
            return
        job_id = running[place % len(running)].task.id
        rig.backend.send(Progress(job_id, progress, "half way"), Recorded(job_id, {"progress": progress}))
        one = rig.model.jobs[job_id]
        assert one.job is not None
        assert one.job.status.progress == progress

    @rule(at=small)
    def crash_of_everything(self, at: int) -> None:
        rig = self.rig(at)
        runs = rig.backend.running()
        if not runs:
            return
        error = ErrorInfo("WorkerDied", "the pool broke", signal="SIGKILL")
        rig.backend.send(*(Failed(run.task.id, JobCause.CRASH, error) for run in runs))

    @rule(at=small, seed=st.integers(0, 1000))
    def by_chance(self, at: int, seed: int) -> None:
        rig = self.rig(at)
        if rig.model.out and not rig.evaluator_closed:
            rig.backend.rng.seed(seed)
            rig.backend.act()

    @rule(at=small, place=st.integers(0, 20), kind=st.integers(0, 6))
    def message_that_comes_late(self, at: int, place: int, kind: int) -> None:
        rig = self.rig(at)
        jobs = [one for one in rig.model.jobs.values() if not one.in_backend]
        if not jobs:
            return
        job_id = jobs[place % len(jobs)].id
        error = ErrorInfo("Late", "again")
        rig.backend.send(
            [
                Started(job_id, self.time.now),
                Progress(job_id, 0.5, "late"),
                Recorded(job_id, {"late": True}),
                Done(job_id, "late"),
                Failed(job_id, JobCause.CRASH, error),
                Cancelled(job_id),
                Lost(job_id, "late"),
            ][kind]
        )

    @rule(seconds=st.sampled_from([0.125, 0.5, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.time.advance(seconds)

    @rule(calls=st.sampled_from([1, 2, 5, 20]))
    def storage_goes_away(self, calls: int) -> None:
        self.storage.away = calls

    @rule()
    def storage_is_back(self) -> None:
        self.storage.away = 0

    # -- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def evaluators_are_as_modelled(self) -> None:
        for rig in self.rigs:
            rig.check()

    def teardown(self) -> None:
        try:
            self.storage.away = 0
            for place, rig in enumerate(self.rigs):
                if not rig.evaluator_closed:
                    while rig.model.out or rig.model.finished:  # callbacks submit more
                        self.rig(place).gather("ALL", 1, 0)
                    rig.close()
            left = [thread for thread in set(threading.enumerate()) - self.threads if thread.is_alive()]
            assert not left
        finally:
            for rig in self.rigs:
                rig.evaluator.close()
            self.stack.close()


EvaluatorMachine.TestCase.settings = bounded(150, stateful_step_count=40)
TestEvaluator = EvaluatorMachine.TestCase
