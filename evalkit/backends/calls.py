"""One run as bytes, for backends that take a Python function elsewhere: pack it here, run it there, read it here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from evalkit.backends.asynchronous import RunFailedError
from evalkit.backends.base import RunFunction
from evalkit.backends.events import Done, Failed, Pickled, Progress, RecordedPickled
from evalkit.backends.execution import failed, identity, visible
from evalkit.backends.importing import importing_function
from evalkit.backends.meter import Meter, event_of
from evalkit.backends.pickled import done, recorded
from evalkit.backends.serialization import dumps, loads
from evalkit.errors import SerializationError
from evalkit.job import JobCause
from evalkit.running import Channel, RunningJob, is_coroutine_function

__all__ = ["pack_call", "read_answer", "run_call"]


def pack_call(run_function: RunFunction, job: RunningJob) -> bytes:
    """The run function and its job, by value where they cannot be imported.

    Raises:
        SerializationError: one of them does not pickle; names the attribute that is to blame.
    """
    function = dumps(run_function, "run_function", function=True)
    args = dumps(job.parameters, "args")
    return dumps((function, args, job.id, job.attempt, job.resources), "call")


def run_call(call: bytes, channel: Channel | None = None) -> bytes:
    """In the worker: run what :func:`pack_call` packed. Whatever it raises or returns, this returns the answer.

    The resources of the job are in the environment of this process meanwhile, so it runs one call at a time.

    Args:
        call: what was packed.
        channel: the way back while it runs; without one, progress and records come with the answer, and no request to
            stop gets there.
    """
    function_data, args_data, job_id, attempt, resources = loads(call)
    worker = identity("call")
    collector = _Collector()
    try:
        with importing_function():
            function = loads(function_data)
        args = loads(args_data)
        job = RunningJob(args, job_id, attempt, collector if channel is None else channel, None, resources)
    except BaseException as exc:  # noqa: BLE001 - the function or the arguments cannot be rebuilt here
        end: Done | Failed = failed(job_id, exc, None, worker)
    else:
        with visible(resources):
            end = event_of(job_id, Meter().run(_plain(function), job), worker)
    if isinstance(end, Done):
        try:
            end.output = dumps(end.output, "output")
        except SerializationError as exc:
            end = failed(job_id, exc, end.measured, worker)
    return dumps((collector.said, end), "answer")


def read_answer(answer: bytes, job: RunningJob, say_where: Callable[[RunningJob, str, int], None] | None = None) -> Any:
    """Read what :func:`run_call` has answered; what the job said comes first.

    Returns:
        the output; or a :class:`evalkit.backends.Pickled`, if it holds more than plain values and arrays. That is for
        ``execute`` to return, since unpickling may run any code: the evaluator does it, apart from all else.

    Args:
        answer: what ``run_call`` returned.
        job: the one that was packed.
        say_where: told of the host and the process that it ran in; ``self.say_where`` of an ``AsyncBackend``.

    Raises:
        RunFailedError: the run function raised; with the remote traceback.
    """
    said, end = loads(answer)
    for event in said:
        if isinstance(event, Progress):
            job.report(event.progress, event.phase)
        else:
            # Not job.record(): values that are not plain are for the evaluator to unpickle, as the output is.
            job._channel.record(job.id, recorded(job.id, event.values.data).values)  # type: ignore[arg-type]
    if say_where is not None:
        say_where(job, end.worker.host, end.worker.pid)
    if isinstance(end, Failed):
        raise RunFailedError(JobCause.EXCEPTION, end.error)
    return done(job.id, end.output, (), end.measured, None).output


def _plain(function: RunFunction) -> RunFunction:
    if not is_coroutine_function(function):
        return function

    def run_to_its_end(job: RunningJob) -> Any:
        return asyncio.run(function(job))

    return run_to_its_end


class _Collector:
    """The channel of a job that cannot be heard while it runs."""

    def __init__(self) -> None:
        self.said: list[Progress | RecordedPickled] = []

    def progress(self, job_id: str, progress: float, phase: str) -> None:
        self.said.append(Progress(job_id, progress, phase))

    def record(self, job_id: str, values: dict[str, Any]) -> None:
        self.said.append(RecordedPickled(job_id, Pickled(dumps(values, "recorded values"))))

    def stop_requested(self, job_id: str) -> bool:
        return False
