"""The task of which every call is one; it runs in Ray's workers, where this module has to be importable."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

__all__ = ["run_chunk"]

_MAX_PROGRAMS = 4  # that a worker keeps; it may outlive evaluators by far
_programs: OrderedDict[str, Callable[[Any], Any]] = OrderedDict()


def run_chunk(token: str, chunk: Any, program: Callable[[Any], Any] | None = None) -> Any:
    """Call the program of this token with a chunk.

    Args:
        token: names the program.
        chunk: what it is called with.
        program: itself, from the object store. Left out, the one that came earlier is called: fetching it anew would
            make a call half as dear again.

    Returns:
        what the program returned; None if this worker has yet to be given it.
    """
    if program is None:
        program = _programs.get(token)
        if program is None:
            return None
    elif token not in _programs:
        _programs[token] = program
        while len(_programs) > _MAX_PROGRAMS:
            _programs.popitem(last=False)
    return program(chunk)
