"""What travels between an executor and its workers: chunks of jobs one way, what became of them the other.

Numbers and the like travel in the pickle of the whole; every other argument, output and record is a pickle of its own
in it, so that one that cannot be rebuilt harms no other. Jobs, and the ends of those that gave numbers, travel by
columns, which takes less time than rows. Workers that share our memory get and give the objects.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from evalkit.backends.base import Task
from evalkit.backends.done_batch import DoneBatch
from evalkit.backends.events import Done, Ended, Event, Failed, Progress, Recorded, Started, WorkerIdentity
from evalkit.backends.pickled import done, recorded
from evalkit.backends.serialization import dumps
from evalkit.errors import SerializationError
from evalkit.job import JobCause
from evalkit.metadata import MeasuredRuns
from evalkit.running import are_plain, own_copy

__all__ = [
    "PLAIN",
    "Ends",
    "Entries",
    "Kind",
    "Message",
    "Outcome",
    "Packed",
    "Saying",
    "pack",
    "pack_tasks",
    "read_ends",
    "read_saying",
    "unpack_message",
    "unpack_outcome",
]

_FEW = 16  # ends, which travel by rows: a column takes longer to begin
_MAX_CHUNK_BYTES = 2**20  # of arguments; who sends more in one job sends that job alone

#: Types of which a value needs no pickle of its own.
PLAIN = frozenset({bool, int, float, type(None)})

#: The jobs of a chunk, by columns: their indices there, their ids, attempts and arguments.
Entries = tuple[Sequence[int], Sequence[str], Sequence[int], Sequence[Any]]

#: What a worker says of a job: a kind, the index of the job in its chunk, and what the kind needs.
Saying = tuple[Any, ...]


class Kind:
    """The kinds of what a worker says."""

    STARTED = 0  # time
    PROGRESS = 1  # progress, phase
    RECORDED = 2  # values
    DONE = 3  # output, measured
    FAILED = 4  # error, measured
    RETURNED = 5  # it has not started, and will not here
    SKIPPED = 6  # it was asked to stop before it started
    ENDED = 7  # measured; where there is a job_timeout, before its output is pickled


class Packed(bytes):
    """A pickle in a pickle."""

    __slots__ = ()


class Ends(NamedTuple):
    """The ends of runs that gave plain outputs, by columns, in place of as many sayings."""

    indices: Sequence[int]
    outputs: Sequence[Any]
    measured: MeasuredRuns


class Message(NamedTuple):
    """What comes over the side channel.

    Attributes:
        number: of the first run of the chunk.
        sayings: in order.
        worker: who says it.
    """

    number: int
    sayings: Sequence[Saying] | Ends
    worker: WorkerIdentity


class Outcome(NamedTuple):
    """What a call returns.

    Attributes:
        messages: how many messages of this chunk were sent over the side channel.
        jobs: how many ran.
        seconds: that the worker was at it.
        sayings: what had not been said over the side channel.
        worker: who it was.
    """

    messages: int
    jobs: int
    seconds: float
    sayings: Sequence[Saying] | Ends
    worker: WorkerIdentity


def pack(said: Message | Outcome) -> bytes:
    """What a worker says, as it travels."""
    *values, sayings, worker = said
    # A worker in full would take longer than the rest of a short message.
    return pickle.dumps((*values, _in_columns(sayings), worker.host, worker.pid, worker.name), 5)


def unpack_message(data: bytes) -> Message:
    """The inverse of :func:`pack`."""
    number, sayings, *worker = pickle.loads(data)
    return Message(number, sayings, WorkerIdentity(*worker))


def unpack_outcome(data: bytes) -> Outcome:
    """The inverse of :func:`pack`."""
    messages, jobs, seconds, sayings, *worker = pickle.loads(data)
    return Outcome(messages, jobs, seconds, sayings, WorkerIdentity(*worker))


def _in_columns(sayings: Sequence[Saying] | Ends) -> Sequence[Saying] | Ends:
    if isinstance(sayings, Ends) or len(sayings) < _FEW:
        return sayings
    kinds, indices, *rest = zip(*sayings, strict=False)  # they are of one length if they are of one kind
    if kinds.count(Kind.DONE) < len(kinds):
        return sayings
    outputs, measured = rest
    if not PLAIN.issuperset(map(type, outputs)):
        return sayings
    starts, ends, cpu_times, peaks = zip(*measured, strict=True)
    runs = MeasuredRuns(array("d", starts), array("d", ends), array("d", cpu_times), array("q", peaks))
    return Ends(indices, outputs, runs)


_id, _attempt, _args = attrgetter("id"), attrgetter("attempt"), attrgetter("args")


def pack_tasks(
    tasks: Sequence[Task], same_memory: bool
) -> tuple[Entries, list[tuple[Task, SerializationError]], Sequence[Task]]:
    """Jobs as they travel, indexed in this order.

    Returns:
        what goes into the chunk; the jobs whose arguments do not pickle, with why; those that are too many for it.
    """
    if not same_memory and are_plain(args_of := list(map(_args, tasks)), PLAIN):
        return (range(len(tasks)), list(map(_id, tasks)), list(map(_attempt, tasks)), args_of), [], ()
    rows: list[tuple[int, str, int, Any]] = []
    bad: list[tuple[Task, SerializationError]] = []
    size = 0
    for index, task in enumerate(tasks):
        if size > _MAX_CHUNK_BYTES:
            return _entries(rows), bad, tasks[index:]
        args: Any = task.args
        if same_memory:
            args = own_copy(args)
        elif not PLAIN.issuperset(map(type, args.values())):
            try:
                args = Packed(dumps(args, "args"))
            except SerializationError as exc:
                bad.append((task, exc))
                continue
            size += len(args)
        rows.append((index, task.id, task.attempt, args))
    return _entries(rows), bad, ()


def _entries(rows: list[tuple[int, str, int, Any]]) -> Entries:
    indices, ids, attempts, args = zip(*rows, strict=True) if rows else ((), (), (), ())
    return indices, ids, attempts, args


def read_ends(tasks: dict[int, Task], ends: Ends, worker: WorkerIdentity) -> Sequence[Event]:
    """Take the jobs that have ended out of ``tasks``, by their indices, and say so; those not there were abandoned."""
    indices, outputs, measured = ends
    if all(map(tasks.__contains__, indices)):
        return DoneBatch(list(map(tasks.pop, indices)), outputs, measured, worker)
    return [
        Done(tasks.pop(index).id, outputs[row], measured.of(row), worker)
        for row, index in enumerate(indices)
        if index in tasks
    ]


def read_saying(job_id: str, saying: Saying, worker: WorkerIdentity) -> Event:
    """What a worker said as the event that it is; not for RETURNED and SKIPPED, which are none."""
    kind = saying[0]
    if kind == Kind.DONE:
        _, _, output, measured = saying
        if type(output) is Packed:
            return done(job_id, output, (), measured, worker)
        return Done(job_id, output, measured, worker)
    if kind == Kind.FAILED:
        return Failed(job_id, JobCause.EXCEPTION, saying[2], saying[3], worker)
    if kind == Kind.STARTED:
        return Started(job_id, saying[2], worker)
    if kind == Kind.ENDED:
        return Ended(job_id, saying[2])
    if kind == Kind.PROGRESS:
        return Progress(job_id, saying[2], saying[3])
    values = saying[2]
    return recorded(job_id, values) if type(values) is Packed else Recorded(job_id, values)
