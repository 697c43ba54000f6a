"""What the ways of running a job have in common: its channel, its environment, the description of what it raised."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from evalkit.backends.base import Emit
from evalkit.backends.events import Failed, Measured, Pickled, Progress, Recorded, RecordedPickled, WorkerIdentity
from evalkit.job import ErrorInfo, JobCause
from evalkit.usercode import text_of, type_name

__all__ = [
    "LocalChannel",
    "check_worker_init",
    "describe",
    "environment",
    "failed",
    "identity",
    "take_all",
    "visible",
]

_VARIABLES = {"gpu": "CUDA_VISIBLE_DEVICES"}  # kind of resource -> what libraries read
_MAX_TEXT = 200_000  # characters of what an exception says, and of its traceback
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def identity(name: str) -> WorkerIdentity:
    """The present process, under the name of a worker."""
    return WorkerIdentity(socket.gethostname(), os.getpid(), name)


def describe(exc: BaseException) -> ErrorInfo:
    """An exception as text: whatever its ``__str__`` or its traceback do, this does not raise."""
    name = type_name(type(exc)).removeprefix("builtins.").removeprefix("__main__.")
    return ErrorInfo(type=name, message=_cut(text_of(exc)), traceback=_cut(text_of(exc, _traceback)))


def _traceback(exc: BaseException) -> str:
    return "".join(traceback.format_exception(type(exc), exc, _user_part(exc.__traceback__)))


def _cut(text: str) -> str:
    """Leave out the middle of a long text: it travels, and is stored."""
    half = _MAX_TEXT // 2
    return (
        text
        if len(text) <= _MAX_TEXT
        else f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
    )


def _user_part(tb: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of evalkit that lead to the user's code."""
    first = tb
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        tb = tb.tb_next
    return tb or first


def failed(job_id: str, exc: BaseException, measured: Measured | None, worker: WorkerIdentity | None) -> Failed:
    """The event of a run that raised."""
    return Failed(job_id, JobCause.EXCEPTION, describe(exc), measured, worker)


def check_worker_init(worker_init: Any) -> None:
    """Raise ``TypeError`` if this is neither None nor something to call in each worker."""
    if worker_init is not None and not callable(worker_init):
        raise TypeError(f"worker_init takes a callable without parameters, not {worker_init!r}")


def environment(resources: Mapping[str, str]) -> dict[str, str]:
    """The environment variables by which libraries keep to these units: ``CUDA_VISIBLE_DEVICES`` for ``gpu``."""
    return {variable: resources[kind] for kind, variable in _VARIABLES.items() if kind in resources}


@contextlib.contextmanager
def visible(resources: Mapping[str, str]) -> Iterator[None]:
    """Have these units in the environment of this process for as long as the block runs."""
    variables = environment(resources)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class LocalChannel:
    """The channel of one run in this process. One of its own for each, so that what an attempt says or hears that was
    given up has nothing to do with the next one of the same job.
    """

    __slots__ = ("_asked", "_emit", "_open")

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._open = True
        self._asked = False

    def progress(self, job_id: str, progress: float, phase: str) -> None:
        if self._open:
            self._emit([Progress(job_id, progress, phase)])

    def record(self, job_id: str, values: dict[str, Any] | Pickled) -> None:
        if self._open:
            recorded = RecordedPickled(job_id, values) if isinstance(values, Pickled) else Recorded(job_id, values)
            self._emit([recorded])

    def stop_requested(self, job_id: str) -> bool:
        return self._asked

    def request_stop(self) -> None:
        """Ask the run to stop."""
        self._asked = True

    def close(self) -> None:
        """The run has ended, or was given up: it is to stop, and nothing that it says is passed on."""
        self._open = False
        self._asked = True


def take_all(entries: deque[Any]) -> list[Any]:
    """Take what is in a deque from which another thread may take as well: each entry goes to one of the two."""
    taken: list[Any] = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(entries.popleft())
    return taken
