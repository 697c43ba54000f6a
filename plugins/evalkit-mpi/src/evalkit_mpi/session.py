"""A session: one or more evaluators of the root that are open at the same time, and the ranks that serve them.

::

    every rank    meet, on the user's communicator: the root says that it drives, or why it cannot
                  duplicate it twice: for mpi4py.futures, and for our messages, which nothing may get between
    the root      one executor of mpi4py.futures                   the others    serve it
                  one call for each of them, which lasts           run what that call receives
    every rank    part, at a barrier: the root says how many evaluators that were; free the duplicates

The calls of evaluators go to the ranks as messages of ours, into that one call, together with all else that is to be
said: through the executor they would wait for a thread of it to look, which takes most of the time of a short job.

The first evaluator on a communicator opens a session, those that are created before it is closed join it, and the last
that is closed ends it. The other ranks create the same evaluators in the same order: the first of a session serves all
of them, and the others then have been served.
"""

from __future__ import annotations

import array
import logging
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

from mpi4py import MPI
from mpi4py.futures import MPICommExecutor

from evalkit.backends import Lead, Program
from evalkit.errors import BackendError
from evalkit_mpi.calls import Calls, Seat
from evalkit_mpi.serving import WorkerEnd, serve_calls
from evalkit_mpi.tags import END_TAG, STOP_TAG, Kind, kind_of, tag
from evalkit_mpi.waiting import Pauses, wait_for

__all__ = ["Opening", "Session", "meet", "serve", "serve_evaluator"]

_log = logging.getLogger("evalkit")

_BACKOFF = 0.01  # seconds between two looks of mpi4py.futures for the ends of the calls that last
_AT_ONCE = 100  # messages; then there may be something to send, or whoever has lent itself may have what it waits for

#: By which people and batch systems ask a program to end.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class Opening:
    """What the root says when the ranks meet.

    Attributes:
        signals: numbers of the signals that the root answers to; the others leave them to it.
        path: where the root finds modules; the others look there too.
        failure: why there is no evaluator; empty if there is one.
        over: whether the root will create no more of them.
    """

    signals: tuple[int, ...] = ()
    path: tuple[str, ...] = ()
    failure: str = ""
    over: bool = False


def meet(comm: MPI.Intracomm, root: int, opening: Opening | None) -> Opening:
    """Wait for all ranks, and hear what the root says.

    Args:
        opening: what to say, on the root; None elsewhere.
    """
    wait_for(
        comm.Ibarrier(),
        f"rank {comm.Get_rank()} of {comm.Get_size()} waits for others: every rank has to create the same evaluators "
        "in the same order, and one that still runs a job of the last evaluator comes when that job returns",
    )
    said: Opening = comm.bcast(opening, root)
    return said


# -- on the root ------------------------------------------------------------------------------------------------------


class Session:
    """A session, on the root. Made by :meth:`join`.

    Attributes:
        parted: set when all ranks have left it.
    """

    _lock = threading.Lock()
    _open: dict[tuple[int, int], Session] = {}  # noqa: RUF012 - of all, by communicator and root

    @classmethod
    def join(cls, comm: MPI.Intracomm, root: int) -> tuple[Session, int]:
        """The session for one more evaluator, and the number of the evaluator in it."""
        with cls._lock:
            key = (comm.handle, root)
            session = cls._open.get(key)
            if session is None:
                session = cls._open[key] = cls(comm, root)
            session._members += 1
            session._served += 1
            return session, session._served

    @classmethod
    def tell_failure(cls, comm: MPI.Intracomm, root: int, exc: BaseException) -> None:
        """Say to the other ranks that an evaluator could not be created."""
        with cls._lock:
            session = cls._open.get((comm.handle, root))
            if session is not None:
                session._served += 1  # the others are busy in another one, and will pass over this one
                return
        meet(comm, root, Opening(failure=f"{type(exc).__name__}: {exc}"))

    def __init__(self, comm: MPI.Intracomm, root: int) -> None:
        signals = tuple(number for number in _SIGNALS if callable(signal.getsignal(number)))
        meet(comm, root, Opening(signals, tuple(sys.path)))
        self.parted = threading.Event()
        self._key = (comm.handle, root)
        self._root = root
        self._members = 0
        self._served = 0
        self._lasting = comm.Dup()
        self._control = comm.Dup()
        self._workers = [rank for rank in range(comm.Get_size()) if rank != root]
        self._receivers: dict[int, Callable[[Any], None]] = {}
        self._stops: deque[tuple[int, int]] = deque()
        self._seated: set[int] = set()  # evaluators whose programs the workers have
        self._heard = 0  # messages of workers
        self._send_lock = threading.Lock()
        self._sending: list[tuple[MPI.Request, Any]] = []
        self._sent = [0] * comm.Get_size()  # messages to each rank
        self._pauses = Pauses(brief=0.0)
        self._lead = Lead()
        self._over = False
        self._calls = Calls(self._workers, lambda rank, number, chunk: self._send(rank, tag(number, Kind.CALL), chunk))
        self._executor = cast(Executor, MPICommExecutor(self._lasting, root, backoff=_BACKOFF).__enter__())
        for _ in self._workers:
            self._executor.submit(serve_calls).add_done_callback(self._when_served)
        # The interpreter may end while a rank is still in a job that was given up; see evalkit_mpi.ending.
        threading.Thread(target=self._attend, name="evalkit-mpi", daemon=True).start()

    def leave(self) -> None:
        """An evaluator is closed. After the last, all ranks part, in the background."""
        with self._lock:
            self._members -= 1
            if self._members:
                return
            del self._open[self._key]
        self._calls.end(CancelledError("the evaluators are closed"), running=False)
        self._send_to_all(END_TAG, b"")
        self._executor.shutdown(wait=False)
        self._over = True

    @property
    def is_open(self) -> bool:
        """Whether an evaluator is in it."""
        return self._members > 0

    def seat(self, number: int, program: Program) -> Executor:
        """The executor, as one evaluator sees it: shutting it down does not end it for the others.

        Args:
            number: of the evaluator.
            program: what all its calls are of; it goes to each worker once.
        """
        if number not in self._seated:
            self._seated.add(number)
            self._send_to_all(tag(number, Kind.PROGRAM), pickle.dumps(program, 5))
        return Seat(self._calls, number)

    def listen(self, number: int, receive: Callable[[Any], None] | None) -> None:
        """Have ``receive(message)`` called, in one thread at a time, for what workers say to an evaluator."""
        if receive is None:
            self._receivers.pop(number, None)
        else:
            self._receivers[number] = receive

    def request_stop(self, number: int, run: int) -> None:
        """Tell the workers, soon, that a run of an evaluator is to stop."""
        self._stops.append((number, run))

    def _attend(self) -> None:
        """Receive and send until all ranks have parted, so that no worker ever waits to be heard."""
        try:
            all_are_here: MPI.Request | None = None
            while True:
                self._lead.take()
                heard = self._turn()
                if self._over and not heard:
                    all_are_here = all_are_here or self._control.Ibarrier()
                    if all_are_here.Test():
                        break  # with the lead: nobody else touches the communicator any more
                self._lead.release()
                if heard:
                    self._pauses.restart()
                else:
                    self._pauses.make()
            expected = self._control.reduce(0, MPI.SUM, self._root)
            self._control.scatter([(self._served, sent) for sent in self._sent], self._root)
            while self._heard < (expected or 0):
                self._receive()
            for request, _ in self._sending:
                wait_for(request)
            self._lasting.Free()
            self._control.Free()
            self.parted.set()
        except Exception as exc:  # noqa: BLE001 - see _fail
            self._fail(exc)

    def lend(self, done: Callable[[], bool], timeout: float | None) -> None:
        """Have a thread that waits for results look for them."""
        pauses = Pauses()

        def turn(_: float) -> bool:
            try:
                heard = self._turn()
            except BaseException as exc:  # noqa: BLE001 - see _fail; a second Ctrl-C, say
                self._fail(exc)
                return False
            if heard:
                pauses.restart()
            else:
                pauses.make()
            return True

        self._lead.lend(turn, lambda: None, done, timeout)

    def _fail(self, exc: BaseException) -> None:
        """A defect of ours, or the end of MPI. Whoever waits for these calls must not wait for ever."""
        _log.error("the connection to the ranks failed; the calls that they had are given up", exc_info=exc)
        self._calls.end(exc, running=True)

    def _turn(self) -> bool:
        """Receive what has come and send what there is to send; say whether anything came."""
        heard = False
        for _ in range(_AT_ONCE):
            if not self._receive():
                break
            heard = True
        if self._stops:
            # All that is there in one message: as many messages as ranks, whatever the number of jobs.
            pairs = array.array("q")
            while self._stops:
                pairs.extend(self._stops.popleft())
            self._send_to_all(STOP_TAG, pairs)
        if self._sending:
            with self._send_lock:
                self._sending = [entry for entry in self._sending if not entry[0].Test()]
        return heard

    def _receive(self) -> bool:
        """Receive a message, if there is one."""
        status = MPI.Status()
        message = self._control.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)
        if message is None:
            return False
        self._heard += 1
        payload = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([payload, MPI.BYTE])
        self._take(status.Get_source(), *kind_of(status.Get_tag()), payload)
        return True

    def _take(self, rank: int, number: int, kind: Kind, payload: bytearray) -> None:
        """A message has come."""
        if kind is Kind.ANSWER:
            self._calls.answer(rank, bytes(payload))
        elif kind is Kind.FAILURE:
            self._calls.fail(rank, bytes(payload))
        elif (receive := self._receivers.get(number)) is not None:
            receive(bytes(payload))

    def _send(self, rank: int, tag: int, content: bytes | array.array[int]) -> None:
        """Send a message, of which the content must not change; who sends does not wait."""
        with self._send_lock:
            self._sending.append((self._control.Isend([content, MPI.BYTE], rank, tag), content))
            self._sent[rank] += 1
        self._pauses.restart()  # something comes back, and may come soon

    def _send_to_all(self, tag: int, content: bytes | array.array[int]) -> None:
        for worker in self._workers:
            self._send(worker, tag, content)

    def _when_served(self, lasting: Future[None]) -> None:
        """The call of a rank has ended; before the end of the session, that is a defect of ours."""
        exc = None if lasting.cancelled() else lasting.exception()
        if exc is not None:
            self._calls.end(exc, running=True)


# -- on the other ranks -----------------------------------------------------------------------------------------------

_served_already: dict[tuple[int, int], int] = {}  # by communicator and root


def serve_evaluator(comm: MPI.Intracomm, root: int) -> None:
    """Serve the evaluator that this rank creates and the root too, until that is closed, and those that joined it.

    Raises:
        BackendError: the root could not create it.
    """
    key = (comm.handle, root)
    left = _served_already.get(key, 0)
    if left:
        _served_already[key] = left - 1
    else:
        _served_already[key] = serve(comm, root) - 1


def serve(comm: MPI.Intracomm, root: int) -> int:
    """Serve the next session that the root opens, until all ranks part.

    Returns:
        how many evaluators were in it; 0 if the root will create no more of them.

    Raises:
        BackendError: the root could not create an evaluator.
    """
    opening = meet(comm, root, None)
    if opening.over:
        return 0
    if opening.failure:
        raise BackendError(f"rank {root} could not create the evaluator: {opening.failure}")
    sys.path += [entry for entry in opening.path if entry not in sys.path]
    lasting = comm.Dup()
    control = comm.Dup()
    with _left_to_the_root(opening.signals):
        end = WorkerEnd.present = WorkerEnd(control, root)
        with MPICommExecutor(lasting, root):
            pass  # entering it serves
        WorkerEnd.present = None
        sent = end.close()
        wait_for(control.Ibarrier())
    # A message that nobody receives would come to the next communicator with the number of this one.
    control.reduce(sent, MPI.SUM, root)
    served, expected = control.scatter(None, root)
    end.drain(expected)
    lasting.Free()
    control.Free()
    return int(served)


@contextmanager
def _left_to_the_root(numbers: tuple[int, ...]) -> Iterator[None]:
    """Take no notice of these signals: launchers send them to every rank, and the root decides what they mean."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A function and not SIG_IGN, which the programs that a job starts would inherit.
    before = {number: signal.signal(number, _take_no_notice) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _take_no_notice(_number: int, _frame: FrameType | None) -> None:
    return
