"""The side channel over MPI: what workers say while they run, and requests to stop.

::

    worker ──messages, tagged with the number of the evaluator──▶ thread of the session ──▶ receive
           ◀──pairs: an evaluator, and a run of its that is to stop──
           ◀──the program of an evaluator, once, tagged with its number──

Both ends use a communicator of evalkit's own, so that nothing gets between the messages of the user's program.
"""

from __future__ import annotations

import array
import pickle
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from evalkit.backends import Program, SideChannel, SideChannelClient
from evalkit_mpi.waiting import Pauses, wait_for

if TYPE_CHECKING:
    from evalkit_mpi.session import Session

__all__ = ["STOP_TAG", "MPIChannel", "WorkerEnd", "run_chunk"]

#: Of requests to stop; programs, and the messages of workers, have the numbers of evaluators, from 1 on.
STOP_TAG = 0

_LOOK_INTERVAL = 0.005  # seconds between two looks for requests to stop; a look costs as much as a short job


class MPIChannel(SideChannel):
    """The root's end of one evaluator.

    Args:
        session: what it shares with the other evaluators that are open now.
        number: of the evaluator in its session.
    """

    def __init__(self, session: Session, number: int) -> None:
        self.client = _Client(number)
        self._session = session
        self._number = number

    def start(self, receive: Callable[[Any], None]) -> None:
        self._session.listen(self._number, receive)

    def request_stop(self, run: int) -> None:
        self._session.request_stop(self._number, run)

    def close(self) -> None:
        self._session.listen(self._number, None)


class WorkerEnd:
    """A worker's end, which all evaluators of a session share.

    Args:
        control: the communicator of the session.
        root: the rank that drives.
    """

    #: That of the session which this rank serves now.
    present: WorkerEnd | None = None

    def __init__(self, control: MPI.Intracomm, root: int) -> None:
        self._control = control
        self._root = root
        self._lock = threading.Lock()
        self._closed = False
        self._stops: set[tuple[int, int]] = set()
        self._programs: dict[int, Program] = {}
        self._next_look = 0.0
        self._sent = 0
        self._received = 0
        self.name = f"rank {control.Get_rank()} of {control.Get_size()}"

    def send(self, number: int, message: bytes) -> None:
        with self._lock:
            if self._closed:
                raise ConnectionError("the evaluator of this job is closed")
            request = self._control.Isend([message, MPI.BYTE], self._root, number)
            self._sent += 1
        wait_for(request)

    def stop_requested(self, number: int, run: int) -> bool:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_INTERVAL
            with self._lock:
                while not self._closed and self._receive():
                    pass
        return (number, run) in self._stops

    def program(self, number: int) -> Program:
        """The program of an evaluator, which is here or on its way."""
        pauses = Pauses()
        while number not in self._programs:
            with self._lock:
                received = self._receive()
            if not received:
                pauses.sleep()
        return self._programs[number]

    def _receive(self) -> bool:
        """With the lock: receive a message, if there is one."""
        status = MPI.Status()
        message = self._control.Improbe(self._root, MPI.ANY_TAG, status)
        if message is None:
            return False
        payload = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([payload, MPI.BYTE])
        self._received += 1
        if status.Get_tag() == STOP_TAG:
            pairs = array.array("q", payload)
            self._stops.update(zip(pairs[::2], pairs[1::2], strict=True))
        else:
            self._programs[status.Get_tag()] = pickle.loads(payload)
        return True

    def close(self) -> int:
        """The session is over; a thread that a job has left behind is not heard any more.

        Returns:
            how many messages this rank has sent.
        """
        with self._lock:
            self._closed = True
            return self._sent

    def drain(self, expected: int) -> None:
        """Receive what nobody has asked for, until that many messages have come since the start."""
        with self._lock:
            while self._received < expected:
                self._receive()


def run_chunk(number: int, chunk: bytes) -> Any:
    """What every call is: on a worker, run a chunk of an evaluator."""
    end = WorkerEnd.present
    if end is None:
        raise RuntimeError("this rank serves no evaluator")
    return end.program(number)(chunk)


class _Client(SideChannelClient):
    """What travels to the workers."""

    def __init__(self, number: int) -> None:
        self._number = number

    def send(self, message: bytes) -> None:
        end = WorkerEnd.present
        if end is None:
            raise ConnectionError("the evaluator of this job is closed")
        end.send(self._number, message)

    def stop_requested(self, run: int) -> bool:
        end = WorkerEnd.present
        return end is not None and end.stop_requested(self._number, run)
