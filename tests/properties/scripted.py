"""ScriptedBackend: an engine that does what the test says, one message at a time, and keeps to its contract."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from faketime import FakeTime

from evalkit import ErrorInfo, JobCause
from evalkit.backends import (
    Backend,
    Cancelled,
    Capabilities,
    Done,
    Event,
    Failed,
    Lost,
    Progress,
    Recorded,
    Released,
    Rerun,
    Started,
    Task,
    WorkerIdentity,
)

__all__ = ["Run", "ScriptedBackend"]

WORKER = WorkerIdentity("host", 1, "scripted-0")


@dataclass
class Run:
    """One attempt of a job in the backend."""

    task: Task
    attempt: int
    running: bool = False
    began: float | None = None  # when it was told to run
    dropped: bool = False  # it was cancelled before it started, and is to be told so
    asked: float | None = None  # when it was asked to stop
    killed: bool = False  # its end is to be told


@dataclass
class Watcher:
    """Who is told what the evaluator asks of the backend, and each message before it is sent."""

    sent: Callable[[Event], None] = lambda event: None
    dispatched: Callable[[Task], None] = lambda task: None
    asked: Callable[[Run], None] = lambda run: None
    killed: Callable[[Run], None] = lambda run: None


class ScriptedBackend(Backend):
    """Runs nothing. The test says what happens; :meth:`act` makes something happen by chance, under a seed.

    Args:
        inline: gathers drive it, by ``step``.
        prompt: a cancelled or killed run is told of at once, within ``cancel``; otherwise by a later act.
        deep: how many more tasks than workers it holds.
        abandons: what is killed goes on, and returns at some time.
    """

    capabilities = Capabilities(
        kills_running=True, isolates_crashes=True, same_memory=True, by_value=True, streams=True
    )

    def __init__(
        self, num_workers: int, time: FakeTime, *, inline: bool, prompt: bool, deep: int, abandons: bool = False
    ) -> None:
        super().__init__(num_workers)
        self.runs_in_caller = inline
        self.runs: dict[str, Run] = {}
        self.abandoned: list[Run] = []
        self.watcher = Watcher()
        self.rng = random.Random(0)
        self.stopped = False
        self._time = time
        self.prompt = prompt
        self._deep = deep
        self._abandons = abandons
        self._acts = 0

    # -- what the evaluator asks ----------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        return self.num_workers + self._deep

    def start(self, run_function, emit) -> None:
        self._emit = emit

    def dispatch(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            assert task.id not in self.runs, "dispatched while it is in the backend"
            assert len(self.runs) < self.capacity, "more than it has room for"
            self.runs[task.id] = Run(task, task.attempt)
            self.watcher.dispatched(task)

    def cancel(self, job_id: str, kill: bool) -> None:
        run = self.runs.get(job_id)
        if run is None:
            return
        if not run.running:
            run.dropped = True
        elif kill:
            self.watcher.killed(run)
            run.killed = True
        elif run.asked is None:
            run.asked = self._time.now
            self.watcher.asked(run)
        if self.prompt and (run.dropped or run.killed):
            self.send(self._own_end(run))

    def step(self, limit: int, timeout: float | None) -> bool:
        self.act()
        return True

    def stop(self, grace: float) -> None:
        self.stopped = True
        self.runs.clear()

    # -- what the test says ---------------------------------------------------------------------------------------

    def send(self, *events: Event) -> None:
        """Tell the evaluator all this at once."""
        for event in events:
            self._note(event)
            self.watcher.sent(event)
        self._emit(list(events))

    def _note(self, event: Event) -> None:
        run = self.runs.get(event.job_id)
        if isinstance(event, Released):
            self.abandoned = [one for one in self.abandoned if (one.task.id, one.attempt) != _run_of(event)]
            return
        if run is None:
            return  # a message nobody waits for
        if isinstance(event, Started):
            run.running, run.began = True, self._time.now
        elif isinstance(event, Rerun):
            run.running = False
        elif not isinstance(event, Progress | Recorded):
            del self.runs[event.job_id]
            if isinstance(event, Failed) and event.abandoned:
                self.abandoned.append(run)

    def _own_end(self, run: Run) -> Event:
        if run.dropped:
            return Cancelled(run.task.id)
        return Failed(run.task.id, JobCause.LOST, ErrorInfo("Killed", "it was asked for"), abandoned=self._abandons)

    def waiting(self) -> list[Run]:
        return [run for run in self.runs.values() if not run.running and not run.dropped]

    def running(self) -> list[Run]:
        return [run for run in self.runs.values() if run.running and not run.killed]

    def started(self, run: Run) -> Event:
        return Started(run.task.id, self._time.now, WORKER)

    def ends(self, run: Run) -> list[Event]:
        """In how many ways a running job may end."""
        job_id, now = run.task.id, self._time.now
        measured = (now - 0.25 if run.began is None else run.began, now, 0.1, 1000)
        causes = (JobCause.EXCEPTION, JobCause.CRASH, JobCause.MEMORY, JobCause.LOST)
        return [
            Done(job_id, ("output", job_id, run.attempt), measured, WORKER),
            Done(job_id, {"objective": 1.0, "metadata": {"m": run.attempt}}, None, None),
            *(Failed(job_id, cause, ErrorInfo("Scripted", cause), None, WORKER) for cause in causes),
            Lost(job_id, "the node is gone"),
        ]

    # -- what happens by chance -----------------------------------------------------------------------------------

    def act(self) -> None:
        """Let something happen; often enough of it, and every job ends."""
        self._acts += 1
        due = [run for run in self.runs.values() if run.dropped or run.killed]
        running, waiting = self.running(), self.waiting()
        events: list[Event] = [self._own_end(run) for run in due if self.rng.random() < 0.7]
        events += [Released(run.task.id, run.attempt) for run in self.abandoned if self.rng.random() < 0.3]
        if waiting and len(running) < self.num_workers and self.rng.random() < 0.7:
            events.append(self.started(waiting[0]))
            if self.rng.random() < 0.2:
                events.append(self.rng.choice(self.ends(waiting[0])))
        for run in running:
            if self.rng.random() < 0.3:
                events += [Progress(run.task.id, self.rng.random(), "on"), Recorded(run.task.id, {"n": self._acts})]
            if run.asked is None and self.rng.random() < 0.1:
                events.append(Rerun(run.task.id))
                continue
            if self.rng.random() < 0.4:
                events.append(self.rng.choice(self.ends(run)))
        if events:
            self.send(*events)
        elif self.runs or self.abandoned:
            self._time.advance(self.rng.choice([0.0, 0.25, 1.0]))
        else:
            wait = self._time.next_due - self._time.now
            assert wait < 1e6, "a gather waits for what never comes"
            self._time.advance(wait)


def _run_of(event: Released) -> tuple[str, int]:
    return event.job_id, event.attempt
