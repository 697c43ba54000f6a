"""``mpiexec -n 4 python -m evalkit_mpi script.py``: run a script on one rank, while the others serve its evaluators.

For scripts that were not written for many ranks: they need no ``if evaluator.is_master:``, and may catch anything.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from functools import partial

from evalkit.errors import BackendError
from evalkit_mpi.backend import check_size, load_mpi

__all__ = ["main"]

_USAGE = "usage: mpiexec -n N python -m evalkit_mpi (SCRIPT | -m MODULE | -c CODE) [ARGUMENT ...]"
_ROOT = 0


def main() -> None:
    """Run what the command line says."""
    try:
        comm = load_mpi().COMM_WORLD
        check_size(comm, None)
    except BackendError as exc:
        sys.exit(f"error: {exc}")
    run = _program(sys.argv[1:])
    is_root = comm.Get_rank() == _ROOT
    if run is None:
        sys.exit(_USAGE if is_root else 2)
    from evalkit_mpi.ending import ending
    from evalkit_mpi.session import serve

    if not is_root:
        _serve_all(partial(serve, comm, _ROOT))
        return
    ending.dismisses = True
    ending.watch()
    try:
        run()
        ending.exit_code = 0
    except SystemExit as exc:
        ending.exit_code = 0 if exc.code is None else exc.code if isinstance(exc.code, int) else 1
        raise


def _serve_all(serve_next: Callable[[], int]) -> None:
    while True:
        try:
            if not serve_next():
                return
        except BackendError:
            continue  # the root knows, and may create another one


def _program(words: list[str]) -> Callable[[], object] | None:
    """What to run, with ``sys.argv`` as it expects it."""
    if not words:
        return None
    first, *rest = words
    if first in ("-m", "-c"):
        if not rest:
            return None
        what, *rest = rest
        sys.argv[:] = [what if first == "-m" else first, *rest]
        if first == "-m":
            return lambda: runpy.run_module(what, run_name="__main__", alter_sys=True)
        return lambda: exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)  # noqa: S102
    if first.startswith("-"):
        return None
    sys.argv[:] = [first, *rest]
    sys.path[0] = os.path.dirname(os.path.realpath(first))  # as the interpreter does
    return lambda: runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
