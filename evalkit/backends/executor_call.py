"""A call of an executor, as the main process sees it, and what its failure says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from enum import Enum
from typing import Any

from evalkit.backends.base import Task
from evalkit.backends.chunk_wire import Outcome
from evalkit.backends.events import Cancelled, Event, Failed, Lost, Rerun, Started
from evalkit.backends.side_channel import SideChannel
from evalkit.job import ErrorInfo, JobCause

__all__ = ["Call", "Fault", "Reach", "sort_out"]


class Reach(Enum):
    """How far a fault goes."""

    #: The executor is broken: every call in it fails, and another executor is made.
    EXECUTOR = "executor"
    #: This call failed, and no other.
    CALL = "call"


@dataclass(frozen=True, slots=True)
class Fault:
    """What the exception of a call says that is not of the jobs' own making; see :meth:`ExecutorBackend.blame`.

    Attributes:
        reach: what else is affected.
        cause: of the job that is to blame: CRASH, MEMORY or EXCEPTION. With LOST nobody is: the jobs run again.
        error: what that job fails with.
    """

    reach: Reach
    cause: JobCause
    error: ErrorInfo


class Call:
    """A call of the executor.

    Attributes:
        number: of its first run; the others follow.
        tasks: index -> job, of those whose end is not known. Who takes one out tells of its end.
        started: indices of the runs of which the start was told.
        asked: indices of the runs that were asked to stop.
        doomed: indices of the runs that are to be ended by force.
        received: how many messages of it have been dealt with.
        outcome: what it returned, if that waits for messages that were sent before.
        left: whether its worker is free.
        abandoned: what is to be told of its abandoned runs when it returns.
    """

    __slots__ = (
        "abandoned",
        "asked",
        "doomed",
        "executor",
        "future",
        "left",
        "number",
        "outcome",
        "received",
        "sent",
        "started",
        "tasks",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.tasks: dict[int, Task] = {}
        self.executor: Executor | None = None
        self.future: Future[Any] | None = None
        self.sent = 0.0
        self.started: set[int] = set()
        self.asked: set[int] = set()
        self.doomed: set[int] = set()
        self.received = 0
        self.outcome: Outcome | None = None
        self.left = False
        self.abandoned: list[Event] = []

    def ask_to_stop(self, index: int, channel: SideChannel | None) -> None:
        """Once."""
        if index not in self.asked and channel is not None:
            channel.request_stop(self.number + index)
        self.asked.add(index)


def sort_out(calls: Sequence[Call], fault: Fault) -> tuple[list[Event], list[Task], list[Task]]:
    """What becomes of the jobs in calls that failed together.

    Returns:
        what is to be told; the jobs that run again since it was another's fault; those that do so since any of them may
        be to blame.
    """
    killed = ErrorInfo("Killed", "it was ended by force")
    events: list[Event] = [
        Failed(call.tasks.pop(index).id, JobCause.LOST, killed)
        for call in calls
        for index in call.doomed & call.tasks.keys()
    ]
    if events:
        return events, _again(calls, events), []
    tasks = [task for call in calls for task in call.tasks.values()]
    if fault.cause is JobCause.LOST:
        return [Lost(task.id, str(fault.error)) for task in tasks], [], []
    if len(tasks) != 1:
        return events, [], _again(calls, events)
    (culprit,) = tasks
    if not any(call.started & call.tasks.keys() for call in calls):
        events.append(Started(culprit.id, time.time()))  # it ended before that could be said
    events.append(Failed(culprit.id, fault.cause, fault.error))
    return events, [], []


def _again(calls: Sequence[Call], events: list[Event]) -> list[Task]:
    """The jobs of these calls that run again; what is to be told of that, and of the others, is in the events."""
    tasks = []
    for call in calls:
        for index, task in call.tasks.items():
            if index in call.asked:
                events.append(Cancelled(task.id))
                continue
            if index in call.started:
                events.append(Rerun(task.id))
            tasks.append(task)
    return tasks
