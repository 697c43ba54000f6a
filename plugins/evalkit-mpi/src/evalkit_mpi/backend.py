"""MPICommBackend: jobs on the ranks of a communicator, by mpi4py.futures."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mpi4py  # noqa: F401 - it starts no MPI; where it is missing, evalkit says which line installs it

from evalkit.backends import Capabilities, Emit, Event, ExecutorBackend, Failed, RunFunction, SideChannel
from evalkit.errors import BackendError

if TYPE_CHECKING:
    from mpi4py import MPI

    from evalkit_mpi.session import Session

__all__ = ["MPICommBackend", "check_size", "load_mpi"]

_PARTING = 2.0  # seconds that close waits for ranks that are still in a job


class MPICommBackend(ExecutorBackend):
    """Jobs on the ranks of an MPI program, which all run the same script: the root drives, the others serve.

    Every rank creates the evaluator. On the root, ``is_master`` is True, and all is as on every other backend. On the
    others, ``Evaluator.create`` runs what the root sends, and returns when the root has closed the evaluator; they open
    no storage and call no callbacks. All ranks go on past the ``with`` block together. An exception that leaves it on
    the root ends every rank: results are stored, the traceback is shown, and the program exits with 1.

    MPI cannot end one job and does not outlive a rank. So a job past its time is asked to stop and then abandoned: it
    keeps its rank until it returns. A rank that dies takes the program along; what was gathered is in the storage, and
    a resume runs the rest.

    Args:
        num_workers: how many jobs run at once; None for as many as there are other ranks, which is the default and the
            most.
        comm: an intracommunicator of mpi4py, the same on all its ranks; None for ``MPI.COMM_WORLD``.
        root: the rank in ``comm`` that drives.
        worker_init: called once in each rank before its first job; what it returns is ``job.worker_state``.
        batching: whether cheap jobs may travel together.
        hold: seconds that a result may be held back by others that travelled with it.

    Raises:
        BackendError: there is no MPI library, it does not let several threads call it, or there is one rank alone.
    """

    capabilities = Capabilities(by_value=True, streams=True, spans_nodes=True)
    default_num_workers = None

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        comm: MPI.Intracomm | None = None,
        root: int = 0,
        worker_init: Callable[[], Any] | None = None,
        batching: bool = True,
        hold: float = 0.010,
    ) -> None:
        mpi = load_mpi()
        if comm is None:
            comm = mpi.COMM_WORLD
        if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
            raise TypeError(f"comm takes an intracommunicator of mpi4py, such as MPI.COMM_WORLD, not {comm!r}")
        check_size(comm, num_workers)
        size = comm.Get_size()
        if type(root) is not int or not 0 <= root < size:
            raise ValueError(f"root takes the number of a rank, from 0 to {size - 1}, not {root!r}")
        if num_workers is None:
            num_workers = size - 1
        if num_workers > size - 1:
            raise ValueError(
                f"num_workers={num_workers} needs {num_workers + 1} ranks, one that drives and others that work, and "
                f"there are {size}: leave it out, or start more ranks"
            )
        super().__init__(num_workers, worker_init=worker_init, batching=batching, hold=hold)
        self._comm = comm
        self._root = root
        self._is_master: bool = comm.Get_rank() == root
        self._session: Session | None = None
        self._number = 0
        self._driving = False
        self._released = False

    @property
    def is_master(self) -> bool:
        return self._is_master

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        from evalkit_mpi.ending import ending
        from evalkit_mpi.session import Session, serve_evaluator

        if not self._is_master:
            serve_evaluator(self._comm, self._root)
            return
        ending.watch(self)
        self._session, self._number = Session.join(self._comm, self._root)
        super().start(run_function, partial(_say_where, emit))
        self._driving = True

    def make_channel(self) -> SideChannel:
        from evalkit_mpi.channel import MPIChannel

        return MPIChannel(self._joined, self._number)

    def make_executor(self) -> Executor:
        return self._joined.seat(self._number, self.program)

    def shut_executor(self, executor: Executor, grace: float) -> None:
        return  # it is the session's, which ends with its last evaluator

    def lend(self, done: Callable[[], bool], timeout: float | None) -> None:
        self._joined.lend(done, timeout)

    @property
    def _joined(self) -> Session:
        if self._session is None:
            raise RuntimeError("this backend is not started")
        return self._session

    @staticmethod
    def worker_name() -> str:
        from evalkit_mpi.serving import WorkerEnd

        if WorkerEnd.present is None:
            raise RuntimeError("this rank serves no evaluator")
        return WorkerEnd.present.name

    def release(self, exc: BaseException | None) -> None:
        from evalkit_mpi.ending import ending
        from evalkit_mpi.session import Session

        if self._released or not self._is_master:
            return
        if exc is not None and self._session is None:
            self._released = True
            Session.tell_failure(self._comm, self._root, exc)
        elif exc is not None and self._driving and ending.is_fatal(exc):
            ending.abort_by(exc)
        else:
            self.let_go(_PARTING)

    def let_go(self, patience: float) -> bool:
        """Let the ranks go on that serve this backend; it is stopped, if it was not.

        Args:
            patience: seconds to wait for those that still run a job that was given up.

        Returns:
            whether no rank is in it any more; True as well if other evaluators keep them.
        """
        if self._session is None:
            return True
        if not self._released:
            self._released = True
            self.stop(0.0)
            self._session.leave()
        return self._session.is_open or self._session.parted.wait(patience)


def _say_where(emit: Emit, events: Sequence[Event]) -> None:
    """Tell what happens, and of what a worker raised, in which rank and on which host."""
    emit([_with_place(event) if isinstance(event, Failed) else event for event in events])


def _with_place(event: Failed) -> Failed:
    if event.worker is None or not event.error.traceback:
        return event
    traceback = f"{event.error.traceback}in {event.worker.name} on {event.worker.host}\n"
    return replace(event, error=replace(event.error, traceback=traceback))


def load_mpi() -> ModuleType:
    """The module ``mpi4py.MPI``.

    Raises:
        BackendError: there is no MPI library, or it does not let several threads call it.
    """
    # Not at the top: importing it starts MPI, which on some clusters ends a program that mpiexec has not started.
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as exc:
        raise BackendError(
            f"mpicomm needs an MPI library, and mpi4py found none ({exc}): pip install 'mpich>=4.2', or on a cluster "
            "load its MPI module"
        ) from exc
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise BackendError(
            "mpicomm calls MPI from several threads, and this MPI was not started with MPI_THREAD_MULTIPLE: leave "
            "mpi4py.rc.threads and mpi4py.rc.thread_level as they are (on Cray, export "
            "MPICH_MAX_THREAD_SAFETY=multiple)"
        )
    return MPI


def check_size(comm: MPI.Intracomm, num_workers: int | None) -> None:
    """Raise ``BackendError`` if there is nobody to work, with the line to type."""
    if comm.Get_size() > 1:
        return
    if sys.flags.interactive or not sys.argv[0]:
        command = ["python", "script.py"]
    else:
        command = [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]
    line = shlex.join(["mpiexec", "-n", str(max(2, num_workers or 0) + 1), *command])
    message = f"mpicomm needs a rank that drives and others that work, and this is one alone: start it with\n    {line}"
    sizes = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
    started = next((f"{name}={os.environ[name]}" for name in sizes if os.environ.get(name, "1") != "1"), None)
    if started is not None:
        library = load_mpi().Get_library_version().split("\n")[0].strip()
        message += (
            f"\nIt was started as several ({started}), by a launcher that is not the one of the MPI library that "
            f"mpi4py uses here, {library}: use the mpiexec of that library"
        )
    raise BackendError(message)
