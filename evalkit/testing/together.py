"""Run functions at once, in threads or in processes: what the conformance suites race with."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["in_processes", "in_threads"]

#: How long to wait for the others to start or to answer before something is taken to be broken, in seconds.
_PATIENCE = 300.0


def in_threads(n: int, function: Callable[[int], Any]) -> list[Any]:
    """Call ``function(i)`` in ``n`` threads that start together, for i from 0; return what they returned, in order.

    Raises:
        Exception: the first one that a call raised, once all have ended.
    """
    barrier = threading.Barrier(n)
    results: list[Any] = [None] * n
    errors: list[BaseException] = []

    def call(i: int) -> None:
        try:
            barrier.wait(_PATIENCE)
            results[i] = function(i)
        except BaseException as exc:  # noqa: BLE001 - it is raised in the caller's thread
            errors.append(exc)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def in_processes(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(i, *args)`` in ``n`` new interpreters that start together; return what they returned, in order.

    Args:
        n: how many.
        function: importable, since the processes are spawned.
        args: given to each; they are pickled.

    Raises:
        Exception: the first one that a call raised, once all have ended; ``EOFError`` if a process died.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(n)
    pipes, processes = [], []
    for i in range(n):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(theirs, barrier, function, i, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    answers: list[tuple[bool, Any]] = []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            answers.append(pipe.recv() if pipe.poll(_PATIENCE) else (False, TimeoutError("no answer from a process")))
        except EOFError as exc:
            answers.append((False, exc))
        finally:
            pipe.close()
            process.join(_PATIENCE)
            process.kill()  # does nothing to one that has ended
            process.join()
            process.close()
    for good, answer in answers:
        if not good:
            raise answer
    return [answer for _, answer in answers]


def _answer(pipe: Connection, barrier: Any, function: Callable[..., Any], i: int, args: tuple[Any, ...]) -> None:
    with pipe:
        try:
            barrier.wait(_PATIENCE)
            pipe.send((True, function(i, *args)))
        except BaseException as exc:  # noqa: BLE001 - it is raised in the caller's process
            pipe.send((False, exc))
