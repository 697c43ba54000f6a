"""Evaluators that a module creates when it is imported, which its workers would do as well, and theirs, without end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from evalkit.errors import BackendError

__all__ = ["check_not_importing", "importing_function"]

_here = threading.local()


@contextlib.contextmanager
def importing_function() -> Iterator[None]:
    """In this block, the modules of a run function are imported: what starts workers of its own is refused."""
    before = getattr(_here, "importing", False)
    _here.importing = True
    try:
        yield
    finally:
        _here.importing = before


def check_not_importing() -> None:
    """Raise BackendError in a block of :func:`importing_function`."""
    if getattr(_here, "importing", False):
        raise BackendError(
            "the module of the run function creates an evaluator when it is imported, and each worker imports it: "
            'put that under `if __name__ == "__main__":`'
        )
