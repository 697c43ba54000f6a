"""The task of which every call is one, or the first of several; it runs in Ray's workers, where this module has to be
importable.
"""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from socket import socket
from typing import Any, NamedTuple

import ray

from evalkit.backends import PeerAddress
from evalkit_ray import lines

__all__ = ["Delivery", "Served", "Ticket", "run_chunk"]

#: What a task returns that has answered all its calls over its line: how many, and the last answer once more. It may
#: not have come through, where the main program could not open the line.
Served = tuple[int, bytes]

#: Of a task: the token that names the program, the number of the task, the node of the main program, and the address of
#: its lines there. A plain tuple, which Ray packs faster.
Ticket = tuple[str, int, str, PeerAddress]

_SHORT = 0.1  # seconds; what takes longer is not made any faster by a line
_SESSION = 0.25  # seconds after which a task ends, so that others get their turn; a task costs a few milliseconds
_LINGER = 0.005  # seconds for which it waits for another call: others may be waiting for the worker
_MAX_PROGRAMS = 4  # that a worker keeps; it may outlive evaluators by far

_programs: OrderedDict[str, Callable[[Any], Any]] = OrderedDict()
_node = ""  # on which this worker is, once it was asked


class Delivery(NamedTuple):
    """What the object store holds.

    Attributes:
        program: what calls are of.
        path: where the main program imports from. Ray's workers know the folder of the script only.
    """

    program: Callable[[Any], Any]
    path: list[str]


def run_chunk(ticket: Ticket, chunk: Any, delivery: Delivery | None = None) -> Any:
    """Call a program with a chunk; on the node of the main program, and if it was short, do that with others after it.

    Args:
        ticket: which program, and where there may be more.
        chunk: what it is called with.
        delivery: brings the program. Left out, the one that came earlier is called: fetching it anew would make a call
            half as dear again.

    Returns:
        what the program returned, for the chunk that has not been answered over the line; ``Served`` if there is none;
        None if this worker has yet to be given the program, and has done nothing.
    """
    token, number, node, address = ticket
    program = _programs.get(token)
    if program is None:
        if delivery is None:
            return None
        # Behind its own, so that what is installed here comes first.
        sys.path += [folder for folder in delivery.path if folder not in sys.path]
        program = _programs[token] = delivery.program
        while len(_programs) > _MAX_PROGRAMS:
            _programs.popitem(last=False)
    start = time.monotonic()
    answer = _call(program, chunk)
    if node != _own_node() or not _fits(answer, start):
        return answer
    line = lines.connect(address, number)
    if line is None:
        return answer
    with line:
        return _serve(program, line, answer, start + _SESSION)


def _serve(program: Callable[[Any], Any], line: socket, answer: Any, until: float) -> Any:
    """Answer, and take what comes next, until nothing does."""
    count, start = 0, time.monotonic()
    while _fits(answer, start) and time.monotonic() < until:
        if not lines.answer(line, answer):
            break
        count += 1
        chunk = lines.receive(line, _LINGER)
        if chunk is None:
            return count, answer
        start = time.monotonic()
        answer = _call(program, chunk)
    return answer


def _fits(answer: Any, start: float) -> bool:
    return isinstance(answer, bytes) and len(answer) <= lines.LONGEST and time.monotonic() - start < _SHORT


def _call(program: Callable[[Any], Any], chunk: Any) -> Any:
    try:
        return program(chunk)
    finally:
        _reopen_streams()


def _own_node() -> str:
    global _node
    if not _node:
        _node = ray.get_runtime_context().get_node_id()
    return _node


def _reopen_streams() -> None:
    """Ray writes to them around each task: if a job has closed them, Ray would fail the tasks that follow."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.closed:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the worker lives
