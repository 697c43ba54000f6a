"""Program: what every call of an executor runs, and what stays of it in a worker."""

from __future__ import annotations

import os
import pickle
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evalkit.backends.base import RunFunction
from evalkit.backends.chunk_run import ChunkRun, Place, Ticker, WorkerThread
from evalkit.backends.chunk_wire import pack
from evalkit.backends.execution import identity
from evalkit.backends.importing import importing_function
from evalkit.backends.serialization import loads
from evalkit.backends.side_channel import SideChannelClient
from evalkit.running import RunningJob

__all__ = ["Program", "Setup"]

_MAX_RESIDENTS = 4  # programs that a worker keeps ready


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs to run jobs.

    Attributes:
        function: the run function; as a pickle, unless the workers share our memory.
        worker_init: called once in each worker, or None; as ``function``.
        worker_name: called in each worker for its name.
        client: the worker's end of the side channel, if there is one.
        hold: seconds.
        prompt: whether each start is told before the job runs, since time counts from it: the ticker cannot tell of a
            job that lets no other thread run.
    """

    function: RunFunction | bytes
    worker_init: Callable[[], Any] | bytes | None
    worker_name: Callable[[], str]
    client: SideChannelClient | None
    hold: float
    prompt: bool = False


class Program:
    """What every call of an executor runs: ``program(chunk)``. Picklable, and the same for all calls.

    An engine that can hold something once in each worker, or in an object store, may hold the program there; one whose
    executor takes an initializer may give it ``program.install``, and then call ``program.resident`` instead.
    """

    def __init__(self, setup: Setup | bytes, token: str | None = None) -> None:
        self._setup = setup
        self._token = token or uuid.uuid4().hex

    def __reduce__(self) -> tuple[type[Program], tuple[Setup | bytes, str]]:
        return Program, (self._setup, self._token)

    def __call__(self, chunk: Any) -> Any:
        """Run the jobs of a chunk, in a worker; return what became of them."""
        return self._ready().run(chunk)

    def install(self) -> None:
        """Get ready, in a worker."""
        self._ready()

    @property
    def resident(self) -> Callable[[Any], Any]:
        """Stands for this program in workers where it was installed, and pickles to a few bytes."""
        return _ResidentProgram(self._token)

    def discard(self) -> None:
        """Forget it, in this process: no call runs it any more."""
        resident = _residents.pop(self._token, None)
        if resident is not None:
            resident.close()

    def _ready(self) -> _Resident:
        resident = _residents.get(self._token)
        if resident is None:
            with _residents_lock:
                resident = _residents.get(self._token)
                if resident is None:
                    setup = self._setup if isinstance(self._setup, Setup) else pickle.loads(self._setup)
                    resident = _residents[self._token] = _Resident(setup)
                    # Workers may outlive evaluators by far.
                    while len(_residents) > _MAX_RESIDENTS and not isinstance(self._setup, Setup):
                        _residents.popitem(last=False)[1].close()
        return resident


class _ResidentProgram:
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, chunk: Any) -> Any:
        resident = _residents.get(self._token)
        if resident is None:
            raise RuntimeError(f"the program of this call has not been installed in process {os.getpid()}")
        return resident.run(chunk)


_residents: OrderedDict[str, _Resident] = OrderedDict()
_residents_lock = threading.Lock()


class _Resident:
    """A program, ready to run in this process."""

    def __init__(self, setup: Setup) -> None:
        client, same_memory = setup.client, not isinstance(setup.function, bytes)
        ticker = None if client is None else Ticker(setup.hold / 2)
        self._place = Place(client, setup.hold, setup.prompt, same_memory, ticker, os.getpid())
        self._worker_name = setup.worker_name
        self._of_thread = threading.local()
        self._unfit: BaseException | None = None
        self._function: RunFunction = _not_rebuilt
        self._worker_init: Callable[[], Any] | None = None
        try:
            with importing_function():
                self._function = loads(setup.function) if isinstance(setup.function, bytes) else setup.function
                init = setup.worker_init
                self._worker_init = loads(init) if isinstance(init, bytes) else init
        except BaseException as exc:  # noqa: BLE001 - it cannot be rebuilt here, and each job says so
            exc.add_note("The run function could not be rebuilt in the worker.")
            self._unfit = exc

    def close(self) -> None:
        if self._place.ticker is not None:
            self._place.ticker.stop()
        if self._place.client is not None:
            self._place.client.close()

    def run(self, chunk: Any) -> Any:
        """Run the jobs of a chunk."""
        number, entries, resources = pickle.loads(chunk) if isinstance(chunk, bytes) else chunk
        chunk_run = ChunkRun(self._place, self._thread(), number, entries, resources)
        ticker = self._place.ticker
        if ticker is None:
            outcome = chunk_run.run()
        else:
            ticker.add(chunk_run)
            try:
                outcome = chunk_run.run()
            finally:
                ticker.remove(chunk_run)
        return outcome if self._place.same_memory else pack(outcome)

    def _thread(self) -> WorkerThread:
        thread: WorkerThread | None = getattr(self._of_thread, "value", None)
        if thread is None:
            worker = identity(self._worker_name())
            thread = self._of_thread.value = WorkerThread(self._function, self._worker_init, self._unfit, worker)
        return thread


def _not_rebuilt(_job: RunningJob) -> Any:
    """In place of the run function, where it is said to each job that there is none."""
    raise RuntimeError("the run function could not be rebuilt in this worker")
