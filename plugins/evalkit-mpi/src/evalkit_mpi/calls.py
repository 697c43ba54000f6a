"""The calls of a session, on the root: each goes to a rank that has nothing to do, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from evalkit.backends import unpack_exception

__all__ = ["Calls", "Seat"]


class Calls:
    """Which rank has which call, and which calls wait for a rank.

    Args:
        ranks: those that work.
        send: ``send(rank, number, chunk)`` sends a rank a call of an evaluator; it does not wait.
    """

    def __init__(self, ranks: Sequence[int], send: Callable[[int, int, bytes], None]) -> None:
        self._lock = threading.Lock()
        self._send = send
        self._idle = list(ranks)  # the one that worked last is taken first: it looks for messages most often
        self._waiting: deque[tuple[Future[Any], int, bytes]] = deque()
        self._running: dict[int, Future[Any]] = {}
        self._over: BaseException | None = None

    def submit(self, number: int, chunk: bytes) -> Future[Any]:
        """Have a chunk of an evaluator run.

        Raises:
            RuntimeError: the session is over.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._over is not None:
                raise RuntimeError(f"cannot submit any more: {self._over}")
            self._waiting.append((future, number, chunk))
            unsent = self._assign()
        _fail(unsent)
        return future

    def answer(self, rank: int, answer: bytes) -> None:
        """A rank has run its call."""
        future = self._ended(rank)
        if future is not None:
            future.set_result(answer)

    def fail(self, rank: int, pickled: bytes) -> None:
        """The call of a rank has raised an exception."""
        future = self._ended(rank)
        if future is not None:
            future.set_exception(unpack_exception(pickled))

    def end(self, why: BaseException, *, running: bool) -> None:
        """Take no more of them: those that wait are cancelled.

        Args:
            why: for those that come too late.
            running: whether nobody will answer those that run: then they fail, with the same reason.
        """
        with self._lock:
            self._over = self._over or why
            waiting, failing = list(self._waiting), list(self._running.values()) if running else []
            self._waiting.clear()
            if running:
                self._running.clear()
        for future, _, _ in waiting:
            future.cancel()
            future.set_running_or_notify_cancel()
        for future in failing:
            future.set_exception(why)

    def _ended(self, rank: int) -> Future[Any] | None:
        with self._lock:
            future = self._running.pop(rank, None)
            self._idle.append(rank)  # it has room for another by the time at which anybody hears of this one
            unsent = self._assign()
        _fail(unsent)
        return future

    def _assign(self) -> list[tuple[Future[Any], Exception]]:
        """With the lock: send calls to ranks while there are both.

        Returns:
            what MPI refused to send, and why: too much at once, say. That is to fail without the lock.
        """
        unsent: list[tuple[Future[Any], Exception]] = []
        while self._waiting and self._idle:
            future, number, chunk = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                rank = self._idle[-1]
                try:
                    self._send(rank, number, chunk)
                except Exception as exc:  # noqa: BLE001 - whatever it is, the call ends with it
                    unsent.append((future, exc))
                else:
                    self._idle.pop()
                    self._running[rank] = future
        return unsent


class Seat(Executor):
    """The calls of one evaluator; shutting it down does not end it for the others.

    Args:
        calls: of the session.
        number: of the evaluator in it.
    """

    def __init__(self, calls: Calls, number: int) -> None:
        self._calls = calls
        self._number = number

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # ``fn`` is the program, which the ranks have.
        (chunk,) = args
        return self._calls.submit(self._number, chunk)


def _fail(unsent: list[tuple[Future[Any], Exception]]) -> None:
    for future, exc in unsent:
        future.set_exception(exc)
