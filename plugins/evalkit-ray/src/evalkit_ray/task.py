"""The task of which every call is one; it runs in Ray's workers, where this module has to be importable."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Delivery", "run_chunk"]

_MAX_PROGRAMS = 4  # that a worker keeps; it may outlive evaluators by far
_programs: OrderedDict[str, Callable[[Any], Any]] = OrderedDict()


class Delivery(NamedTuple):
    """What the object store holds.

    Attributes:
        program: what calls are of.
        path: where the main program imports from. Ray's workers know the folder of the script only.
    """

    program: Callable[[Any], Any]
    path: list[str]


def run_chunk(token: str, chunk: Any, delivery: Delivery | None = None) -> Any:
    """Call the program of this token with a chunk.

    Args:
        token: names the program.
        chunk: what it is called with.
        delivery: brings the program. Left out, the one that came earlier is called: fetching it anew would make a call
            half as dear again.

    Returns:
        what the program returned; None if this worker has yet to be given it.
    """
    program = _programs.get(token)
    if program is None:
        if delivery is None:
            return None
        # Behind its own, so that what is installed here comes first.
        sys.path += [folder for folder in delivery.path if folder not in sys.path]
        program = _programs[token] = delivery.program
        while len(_programs) > _MAX_PROGRAMS:
            _programs.popitem(last=False)
    try:
        return program(chunk)
    finally:
        _reopen_streams()


def _reopen_streams() -> None:
    """Ray writes to them around each task: if a job has closed them, Ray would fail the tasks that follow."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.closed:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the worker lives
