"""What the parts of the conformance suite of backends stand on: making evaluators, and waiting for one another."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from evalkit import Evaluator, Job
from evalkit.backends.base import Backend, Capabilities
from evalkit.running import is_coroutine_function
from evalkit.testing import functions

__all__ = ["BOUND", "BackendFixtures", "Files", "eventually", "gathering", "in_background"]

#: What "does not hang" means, in seconds: far more than anything takes, even where many share the cores.
BOUND = 180.0


class BackendFixtures:
    """The backend under test; :class:`evalkit.testing.backend.BackendSuite` says what to define."""

    method: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    coroutines: ClassVar[bool] = False
    says_how_workers_die: ClassVar[bool] = True
    takes_back: ClassVar[bool] = True
    exits_at_once: ClassVar[bool] = True
    kills_children: ClassVar[bool] = True
    tiny_jobs: ClassVar[int] = 10_000
    #: Seconds that the suite gives a job that is asked to stop; short, since most of its jobs don't listen.
    grace: ClassVar[float] = 0.2

    _traits: ClassVar[_Traits | None] = None

    def create(self, run_function: Callable[..., Any], **kwargs: Any) -> Evaluator:
        """An evaluator of this backend. Override it for one that no plugin names; ``self.prepare`` the function."""
        return Evaluator.create(self.prepare(run_function), self.method, {**self.options, **kwargs})

    def prepare(self, run_function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as the variant under test takes it: as a coroutine function, or as a plain one."""
        if is_coroutine_function(run_function):
            return run_function
        if self.coroutines:
            return functions.Coroutine(run_function)
        return functions.Plain(run_function) if inspect.isgeneratorfunction(run_function) else run_function

    def command(self, script: Path) -> list[str]:
        """The command line that runs a program on this backend; override it for engines with a launcher of their own,
        as in ``["mpiexec", "-n", "3", sys.executable, str(script)]``.
        """
        return [sys.executable, str(script)]

    # -- what the backend can do ----------------------------------------------------------------------------------

    @property
    def traits(self) -> _Traits:
        """What the backend says of itself; asked once for each suite."""
        cls = type(self)
        if "_traits" not in cls.__dict__ or cls._traits is None:
            with self.create(functions.echo) as evaluator:
                backend = evaluator.backend
                options = inspect.signature(type(backend).__init__).parameters
                cls._traits = _Traits(
                    type(backend),
                    backend.capabilities,
                    backend.runs_in_caller,
                    "worker_init" in options,
                    "capture" in options,
                )
        return cls._traits

    @property
    def can(self) -> Capabilities:
        """The capabilities of the backend."""
        return self.traits.capabilities

    @property
    def inline(self) -> bool:
        """Whether jobs run in the thread that gathers, one at a time."""
        return self.traits.inline

    def need(self, have: bool, what: str) -> None:
        """Skip a test that asks for more than the backend says it can."""
        if not have:
            pytest.skip(f"this backend says that it has no {what}")

    # -- fixtures -------------------------------------------------------------------------------------------------

    @pytest.fixture
    def files(self, tmp_path: Path) -> Iterator[Files]:
        """The files by which a test and its jobs wait for one another; at the end, every job is released."""
        files = Files(tmp_path)
        yield files
        files.release_all()

    @pytest.fixture
    def make(self) -> Iterator[Callable[..., Evaluator]]:
        """``make(run_function, **kwargs)``: :meth:`create` with the grace of the suite; closed at the end."""
        made: list[Evaluator] = []

        def make(run_function: Callable[..., Any], **kwargs: Any) -> Evaluator:
            made.append(self.create(run_function, **{"grace": self.grace, **kwargs}))
            return made[-1]

        yield make
        for evaluator in made:
            in_background(evaluator.close).result(BOUND)


class _Traits:
    def __init__(
        self,
        backend: type[Backend],
        capabilities: Capabilities,
        inline: bool,
        takes_worker_init: bool,
        captures: bool,
    ) -> None:
        self.backend = backend
        self.capabilities = capabilities
        self.inline = inline
        self.takes_worker_init = takes_worker_init
        self.captures = captures


class Files:
    """Files in one directory, as arguments of jobs and as conditions to wait for.

    ``files["a"]`` is the path of a file, which a job waits for or creates.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._named: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self._named.add(name)
        return str(self._directory / name)

    def holder(self, name: str, **more: Any) -> dict[str, Any]:
        """The parameters of a job that creates ``<name>.started``, waits for ``<name>.release``, and then creates
        ``<name>.finished``.
        """
        return {key: self[f"{name}.{key}"] for key in ("started", "release", "finished")} | more

    def create(self, name: str) -> None:
        """Let the jobs go that wait for this file."""
        Path(self[name]).touch()

    def release(self, name: str) -> None:
        """Let the job of :meth:`holder` go."""
        self.create(f"{name}.release")

    def exists(self, name: str) -> bool:
        return Path(self[name]).exists()

    def wait(self, name: str) -> str:
        """Wait for a file that a job creates, and return what is in it."""
        eventually(lambda: self.exists(name), f"the file {name}")
        return Path(self[name]).read_text()

    def wait_started(self, name: str) -> int:
        """Wait until the job of :meth:`holder` runs, and return its process id."""
        return int(self.wait(f"{name}.started"))

    def release_all(self) -> None:
        """Let every job go that waits for anything."""
        for name in list(self._named):
            if not name.endswith((".started", ".finished")) and not self.exists(name):
                self.create(name)


def eventually(condition: Callable[[], Any], what: str, timeout: float = BOUND) -> None:
    """Wait until a condition holds; fail, naming it, if that takes too long."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come about in {timeout:g} s")
        time.sleep(0.005)


def in_background(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Call a function in a daemon thread: ``future.result(BOUND)`` then says if it hangs, and leaves it behind."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            result = function(*args, **kwargs)
        except BaseException as exc:  # noqa: BLE001 - it is raised in the thread that asks
            future.set_exception(exc)
        else:
            future.set_result(result)

    threading.Thread(target=call, name="suite-background", daemon=True).start()
    return future


@contextmanager
def gathering(evaluator: Evaluator) -> Iterator[Future[list[Job]]]:
    """Gather ALL in the background, so that jobs run on every backend; at the end, wait for it."""
    future = in_background(evaluator.gather, "ALL")
    yield future
    future.result(BOUND)
