"""The contract of a backend: where jobs run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from evalkit.backends.events import Event
from evalkit.joblog import JobLog

__all__ = ["Backend", "BackendSpec", "Capabilities", "Emit", "RunFunction", "Task"]

RunFunction = Callable[..., Any]
Emit = Callable[[Sequence[Event]], None]


class Task(Protocol):
    """A job as a backend sees it."""

    @property
    def id(self) -> str: ...

    @property
    def args(self) -> dict[str, Any]:
        """The parameters; the run gets a copy of its own."""
        ...

    @property
    def attempt(self) -> int: ...

    @property
    def resources(self) -> dict[str, str]:
        """The units that this run has to itself, by kind, such as ``{"gpu": "0"}``; mostly none.

        The run gets them as ``RunningJob.resources``. In a process of its own, which runs one job at a time, it also
        gets what :func:`evalkit.backends.environment` makes of them. Either all the tasks of an evaluator
        have some or none has, and with them no more tasks are in hand than there are workers.
        """
        ...


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """What a plugin says of a backend; cheap, since nothing is imported before the backend is used.

    Attributes:
        name: what users write as ``method``.
        target: ``"package.module:Class"``, a :class:`Backend`. The keyword-only parameters of its ``__init__`` are
            the options
            that users may give; everything else is refused before anything starts.
        install: the command that installs what the target imports, such as ``pip install distributed``. Errors show
            it to users in any folder.
        summary: one line for ``evalkit plugins``.
    """

    name: str
    target: str
    install: str = ""
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do. What it cannot is said and answered in a documented way, never ignored.

    Attributes:
        kills_running: a running job can be ended against its will. Without it, a job past its time is abandoned: it
            counts as
            ended, and what it still does is ignored.
        isolates_crashes: a job that takes its process down takes no other job along.
        same_memory: jobs run in this process; what they change, others see.
        by_value: functions that cannot be imported (lambdas, closures, ``__main__``, notebooks) travel.
        streams: progress, records and stop requests flow while the job runs. Without it, they come with the result.
        spans_nodes: jobs may run on other machines.
    """

    kills_running: bool = False
    isolates_crashes: bool = False
    same_memory: bool = False
    by_value: bool = False
    streams: bool = False
    spans_nodes: bool = False


class Backend(ABC):
    """Where jobs run. It knows nothing of storage, callbacks or searches.

    The evaluator calls ``start`` once, then ``dispatch`` and ``cancel`` from any thread (``dispatch`` never twice at
    a time), then ``stop`` once. None of them may wait for a job, except ``stop`` for its grace. What happens is told
    through ``emit``, from whatever thread. ``emit`` may call ``dispatch`` and ``cancel``, so a lock that they take is
    not held meanwhile, or is one that a thread may take again (``threading.RLock``).

    What a backend guarantees, and :class:`evalkit.testing.BackendSuite` checks:

    - Every task that was dispatched ends by exactly one of ``Done``, ``DonePickled``, ``Failed``, ``Cancelled`` and
      ``Lost``, unless ``stop`` comes first. After that, nothing more is emitted for that run, except ``Released`` if it
      was abandoned.
    - ``Started`` comes when a run starts, since ``job_timeout`` counts from it. It may be left out where the end is
      told at once, with what was measured.
    - ``Rerun`` takes a run back that was told of, and was not asked to stop; the task is then as if just dispatched.
    - Events of one job are emitted in order.
    - Tasks start in the order of dispatch, as far as the engine has one order.

    Most authors want :class:`evalkit.backends.AsyncBackend` or :class:`evalkit.backends.ExecutorBackend` instead.

    Args:
        num_workers: how many jobs run at once, at least 1.
    """

    capabilities = Capabilities()
    #: Whether a thread that gathers has to lend itself: the evaluator then calls :meth:`step` while it waits.
    runs_in_caller = False
    #: Seconds that a run may take, None for no limit; set before :meth:`start`. The evaluator sees to it by itself, by
    #: :meth:`cancel`; a backend may want to keep jobs apart that may have to be ended.
    job_timeout: float | None = None
    #: ``num_workers`` where the user gives none; None if the backend finds out itself: its ``__init__`` then gets None.
    default_num_workers: ClassVar[int | None] = 1

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    @property
    def is_master(self) -> bool:
        """Whether this process drives; False on the ranks of an MPI program that only serve.

        Known from ``__init__`` on. Where it is False, :meth:`start` serves: it returns when the process that drives
        has released this one, and nothing else is asked of the backend after that.
        """
        return True

    @property
    def capacity(self) -> int:
        """How many tasks it wants to have in hand, running ones included; the rest wait in the evaluator."""
        return self.num_workers

    @abstractmethod
    def start(self, run_function: RunFunction, emit: Emit) -> None:
        """Get ready to run ``run_function(running_job)``; tell what happens through ``emit(events)``.

        Raises:
            BackendError: the engine cannot start, or, in a process that serves, the one that drives could not.
        """

    @abstractmethod
    def dispatch(self, tasks: Sequence[Task]) -> None:
        """Take these tasks, which are at most what ``capacity`` leaves room for."""

    @abstractmethod
    def cancel(self, job_id: str, kill: bool) -> None:
        """Get rid of a task. What is unknown, or has ended, is ignored.

        A task that has not started is dropped, with ``Cancelled``. A running one is asked to stop; with ``kill`` it
        is ended now, or abandoned where the engine cannot kill, with ``Failed`` soon either way.
        """

    def log_of(self, job_id: str) -> JobLog | None:
        """What a running job has printed by now; None if this backend does not capture it, or the job does not run."""
        return None

    def tell(self) -> None:
        """Emit now what has happened and is kept to be told with more; by default nothing is. From any thread."""
        return

    def step(self, limit: int, timeout: float | None) -> bool:
        """Run up to ``limit`` waiting tasks in this thread; return False if there was nothing to run.

        Args:
            limit: at least 1.
            timeout: how long to wait, in seconds, for another thread that is in here.
        """
        return False

    def lend(self, done: Callable[[], bool], timeout: float | None) -> None:
        """A thread waits for results, and may be made use of meanwhile: to read them, say, which saves the switch to it
        from the thread that would. Returns when ``done()`` is true, or at any time before; by default at once.

        Args:
            done: whether it has what it waits for; true soon after the events of that were emitted.
            timeout: seconds after which it does not wait any more; None for no limit.
        """
        return

    @abstractmethod
    def stop(self, grace: float) -> None:
        """Drop what waits, ask what runs to stop, give it ``grace`` seconds, end it, and release everything.

        Returns within the grace and a few seconds, whatever the jobs do.
        """

    def release(self, exc: BaseException | None) -> None:
        """Let the processes of this program go on that serve this one; called last, when everything is stored.

        Also called instead of all else, if the evaluator could not be created. Called again, it does nothing.

        Args:
            exc: what kept the evaluator from being created, or left its ``with`` block; None if all went well.
        """
        return
