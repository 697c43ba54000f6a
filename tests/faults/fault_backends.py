"""The backends of the fault table: how a program starts on each, and which fault is met in which kind of program."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_jobs import MEMORY

__all__ = ["BACKENDS", "Backend", "Run"]

_INTERRUPTS = ("ctrl-c", "ctrl-c-group", "kill-master")
_DEATHS = ("sigkill", "sigsegv", "os._exit")
_MILD = (
    *("exception", "unpicklable", "sys.exit", "unstorable", "rebuild-exits", "rebuild-hangs"),
    *("memory", "streams", "disk", "children"),
)
_TIME = {"job_timeout": 1.0}
_OUTPUT_TIME = {"output_timeout": 1.0}


@dataclass(frozen=True)
class Run:
    """A program, or several, that meet faults.

    Attributes:
        faults: in this order.
        resumed: one command that each fault ends, and that is given again with ``--resume``; otherwise one evaluator
            that outlives them all.
        options: of the evaluator.
        ranks: of an MPI program.
    """

    name: str
    faults: Sequence[str]
    resumed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 3


@dataclass(frozen=True)
class Backend:
    """One column of the table.

    Attributes:
        needs: modules without which it cannot be tried.
        mpi: whether programs run under mpiexec.
        causes: where the nature of the engine makes a fault end otherwise than elsewhere.
        leaves: faults whose children are nobody's to end: they live on.
        abandons: faults whose job keeps its worker for itself.
    """

    name: str
    runs: Sequence[Run]
    needs: Sequence[str] = ()
    mpi: bool = False
    causes: dict[str, str] = field(default_factory=dict)
    leaves: Sequence[str] = ()
    abandons: Sequence[str] = ()

    @property
    def missing(self) -> str | None:
        """What has to be installed first."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return module
        return "mpiexec" if self.mpi and self._mpiexec() is None else None

    def command(self, ranks: int, *arguments: str) -> list[str]:
        """The command line of a program."""
        launcher = [self._mpiexec() or "mpiexec", "-n", str(ranks)] if self.mpi else []
        return [*launcher, sys.executable, *arguments]

    @staticmethod
    def _mpiexec() -> str | None:
        folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        return shutil.which("mpiexec", path=os.pathsep.join(folders))


def _isolating(name: str, needs: Sequence[str] = (), **settings: Any) -> Backend:
    """One whose workers die without the program."""
    options = settings.pop("options", {})
    return Backend(
        name,
        [
            # Children come last: what a job has left running in a worker that then dies is not found on every engine.
            Run("faults", [*_DEATHS, "descriptors", *_MILD], options=options | _OUTPUT_TIME),
            Run("hangs", ["held", "hang", "hang-c", "hang-deaf", "children-hang"], options=_TIME),
            Run("ends", _INTERRUPTS, resumed=True),
        ],
        needs,
        **settings,
    )


_UNWATCHED = {"memory": "DONE"}
_SAME_MEMORY = {**_UNWATCHED, "rebuild-exits": "DONE", "rebuild-hangs": "DONE"}

BACKENDS = [
    # A result that the worker can no longer send is read out of its memory.
    _isolating("process", options={"job_memory": MEMORY}, causes={"descriptors": "DONE"}),
    _isolating("loky", ["loky", "evalkit_loky"], causes=_UNWATCHED),
    _isolating("ray", ["ray", "evalkit_ray"], causes=_UNWATCHED),
    Backend(
        "thread",
        [
            Run("faults", _MILD),
            Run("hangs", ["held", "hang", "hang-deaf", "children-hang"], options=_TIME),
            Run("ends", [*_DEATHS, "descriptors", "hang-c", *_INTERRUPTS], resumed=True, options=_TIME),
        ],
        causes=_SAME_MEMORY,
        leaves=["children", "children-hang"],
    ),
    Backend(
        "serial",
        [
            Run("faults", _MILD),
            Run("held", ["held"], options=_TIME),
            Run(
                "ends",
                [*_DEATHS, "descriptors", "hang", "hang-c", "hang-deaf", "children-hang", *_INTERRUPTS],
                resumed=True,
                options=_TIME,
            ),
        ],
        causes=_SAME_MEMORY,
        leaves=["children", "children-hang"],
    ),
    Backend(
        "mpicomm",
        [
            Run("faults", _MILD, options=_OUTPUT_TIME),
            Run(
                "hangs",
                ["held", "hang", "hang-c", "hang-deaf", "children-hang"],
                options=_TIME | {"num_workers": 5},
                ranks=6,
            ),
            Run("ends", [*_DEATHS, "descriptors", *_INTERRUPTS], resumed=True),
        ],
        ["mpi4py", "evalkit_mpi"],
        mpi=True,
        leaves=["children", "children-hang"],
        causes=_UNWATCHED,
        abandons=["hang", "hang-c", "hang-deaf", "children-hang"],
    ),
]

#: Faults that somebody else brings about -> the signal that the harness sends. Ctrl-C is what ends a plain hang on a
#: backend that cannot end a job; what stops the interpreter itself leaves only SIGKILL.
SENT = {
    "hang": signal.SIGINT,
    "hang-deaf": signal.SIGINT,
    "children-hang": signal.SIGINT,
    "hang-c": signal.SIGKILL,
    "descriptors": signal.SIGKILL,
    "ctrl-c": signal.SIGINT,
    "ctrl-c-group": signal.SIGINT,
    "kill-master": signal.SIGKILL,
}
