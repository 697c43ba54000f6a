"""The end of the program on the root: MPI ends all ranks together, so none may be left behind in a job.

MPI cannot end a job, and a program of which one rank does not come to its end never ends. So a rank that is still in a
job that was given up, when the root has nothing more to do, is ended with all others.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
import weakref
from typing import TYPE_CHECKING, NoReturn

import mpi4py.futures  # noqa: F401 - what it registers for the end of the program comes before what is registered here
from mpi4py import MPI

from evalkit_mpi.session import Opening, meet

if TYPE_CHECKING:
    from evalkit_mpi.backend import MPICommBackend

__all__ = ["Ending", "ending"]

_FORWARDING = 1.0  # seconds that the launcher has to forward what was said; it drops what is on the way at an abort
_PATIENCE = 2.0  # seconds that ranks which are to part may take


class Ending:
    """What is done at the end of the program, on the root.

    Attributes:
        exit_code: with which the program exits if ranks have to be ended; whoever knows the one it would have had says.
        dismisses: whether the other ranks do nothing but serve, until they are told that it is over.
    """

    def __init__(self) -> None:
        self.exit_code = 1
        self.dismisses = False
        self._backends: weakref.WeakSet[MPICommBackend] = weakref.WeakSet()
        self._registered = False

    def watch(self, *backends: MPICommBackend) -> None:
        """See to it that the ranks of these backends are let go at the end, whether or not they were closed."""
        self._backends.update(backends)
        if not self._registered:
            self._registered = True
            # mpi4py waits for what runs in its executors in a function that it registers here as well. What is
            # registered last is called first.
            with contextlib.suppress(RuntimeError):  # the program is ending
                threading._register_atexit(self._end)  # type: ignore[attr-defined]

    def _end(self) -> None:
        backends = list(self._backends)
        for backend in backends:
            backend.let_go(0.0)
        if not all(backend.let_go(_PATIENCE) for backend in backends):
            _abort(self.exit_code, "one still runs a job that was given up, and MPI cannot end it alone")
        if self.dismisses:
            meet(MPI.COMM_WORLD, MPI.COMM_WORLD.Get_rank(), Opening(over=True))

    def is_fatal(self, exc: BaseException) -> bool:
        """Whether an exception that leaves the ``with`` block ends the program.

        All but an exit in good order. But where the script runs on the root alone, it may catch what it likes: no other
        rank is anywhere else than the root thinks.
        """
        if self.dismisses or isinstance(exc, GeneratorExit):
            return False
        return not isinstance(exc, SystemExit) or exc.code not in (None, 0)

    def abort_by(self, exc: BaseException) -> NoReturn:
        """End all ranks because of an exception."""
        code = 130 if isinstance(exc, KeyboardInterrupt) else 1
        if isinstance(exc, SystemExit) and isinstance(exc.code, int):
            code = exc.code
        else:
            traceback.print_exception(exc)
        _abort(code, "the root left the evaluator by an exception")


def _abort(code: int, why: str) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"evalkit: all {MPI.COMM_WORLD.Get_size()} ranks end, since {why}\n")
        sys.stderr.flush()
    time.sleep(_FORWARDING)
    MPI.COMM_WORLD.Abort(code)
    time.sleep(_PATIENCE)  # type: ignore[unreachable]  # until the launcher has ended us
    os._exit(code)


#: The one of this program.
ending = Ending()
