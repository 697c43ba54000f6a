"""The task of which every call is one, or the first of several; it runs in Ray's workers, where this module has to be
importable.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from socket import socket
from typing import NamedTuple

import ray

from evalkit.backends import PeerAddress
from evalkit_ray import lines

__all__ = ["Delivery", "Report", "Ticket", "run_chunk"]

#: What a task returns: how many calls it has taken, and the answer to the last one, whether or not that was sent over
#: the line: it may not have come through, where the main program could not open the line.
Report = tuple[int, bytes | pickle.PickleBuffer]

#: Of a task: the token that names the program, the number of the task, the node of the main program, and the address of
#: its lines there. A plain tuple, which Ray packs faster.
Ticket = tuple[str, int, str, PeerAddress]

_SHORT = 0.1  # seconds; what takes longer is not made any faster by a line
_SESSION = 0.25  # seconds after which a task ends, so that others get their turn; a task costs a few milliseconds
_LINGER = 0.005  # seconds for which it waits for another call: others may be waiting for the worker
_MAX_PROGRAMS = 4  # that a worker keeps; it may outlive evaluators by far

_Program = Callable[[bytes], bytes]
_programs: OrderedDict[str, _Program] = OrderedDict()
_node = ""  # on which this worker is, once it was asked


class Delivery(NamedTuple):
    """What the object store holds.

    Attributes:
        program: what calls are of.
        path: where the main program imports from. Ray's workers know the folder of the script only.
    """

    program: Callable[[bytes], bytes]
    path: list[str]


def run_chunk(ticket: Ticket, chunk: bytes, delivery: Delivery | None = None) -> Report | None:
    """Call a program with a chunk; on the node of the main program, and if it was short, do that with others after it.

    Args:
        ticket: which program, and where there may be more.
        chunk: what it is called with.
        delivery: brings the program. Left out, the one that came earlier is called: fetching it anew would make a call
            half as dear again.

    Returns:
        what it has done; None if that is nothing, since this worker has yet to be given the program.
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
    calls = 1
    line = lines.connect(address, number) if node == _own_node() and _fits(answer, start) else None
    if line is not None:
        try:
            calls, answer = _serve(program, line, answer, start + _SESSION)
        finally:
            lines.leave(line)
    # What is large is not to be copied into what Ray makes of the pair.
    return calls, answer if len(answer) <= lines.LONGEST else pickle.PickleBuffer(answer)


def _serve(program: _Program, line: socket, answer: bytes, until: float) -> tuple[int, bytes]:
    """Answer, and take what comes next, until nothing does."""
    calls, start = 1, time.monotonic()
    while _fits(answer, start) and time.monotonic() < until and lines.answer(line, answer):
        chunk = lines.receive(line, _LINGER)
        if chunk is None:
            break
        calls += 1
        start = time.monotonic()
        answer = _call(program, chunk)
    return calls, answer


def _fits(answer: bytes, start: float) -> bool:
    return len(answer) <= lines.LONGEST and time.monotonic() - start < _SHORT


def _call(program: _Program, chunk: bytes) -> bytes:
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
