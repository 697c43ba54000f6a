"""What runs on the ranks that work: one endless call of mpi4py.futures, which runs the calls of all evaluators."""

from __future__ import annotations

import array
import pickle
import threading
import time
from collections import deque
from typing import ClassVar

from mpi4py import MPI

from evalkit.backends import Program, pack_exception
from evalkit_mpi.tags import END_TAG, STOP_TAG, Kind, kind_of, tag
from evalkit_mpi.waiting import Pauses, wait_for

__all__ = ["WorkerEnd", "serve_calls"]

_LOOK_INTERVAL = 0.005  # seconds between two looks for requests to stop; a look costs as much as a short job


class WorkerEnd:
    """A rank's end of the connection to the root, which all evaluators of a session share.

    Args:
        control: the communicator of the session.
        root: the rank that drives.
    """

    #: That of the session which this rank serves now.
    present: ClassVar[WorkerEnd | None] = None

    def __init__(self, control: MPI.Intracomm, root: int) -> None:
        self._control = control
        self._root = root
        self._lock = threading.Lock()
        self._closed = False
        self._over = False
        self._stops: set[tuple[int, int]] = set()
        self._pickled: dict[int, bytearray] = {}
        self._programs: dict[int, Program] = {}
        self._calls: deque[tuple[int, bytes]] = deque()
        self._next_look = 0.0
        self._sent = 0
        self._received = 0
        self.name = f"rank {control.Get_rank()} of {control.Get_size()}"

    def send(self, number: int, message: bytes, kind: Kind = Kind.SAID) -> None:
        """Tell an evaluator something.

        Raises:
            ConnectionError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise ConnectionError("the evaluator of this job is closed")
            request = self._control.Isend([message, MPI.BYTE], self._root, tag(number, kind))
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

    def serve(self) -> None:
        """Run the calls that come, until the root says that there are no more."""
        while (call := self._next_call()) is not None:
            number, chunk = call
            try:
                answer, kind = self._program(number)(chunk), Kind.ANSWER
            except BaseException as exc:  # noqa: BLE001 - it belongs to the call
                answer, kind = pack_exception(exc), Kind.FAILURE
            del call, chunk  # it may be large, and the next may be long in coming
            try:
                self.send(number, answer, kind)
            except Exception as exc:  # noqa: BLE001 - MPI refuses it: too much at once, say
                self.send(number, pack_exception(exc), Kind.FAILURE)
            del answer

    def _next_call(self) -> tuple[int, bytes] | None:
        pauses = Pauses()
        while True:
            with self._lock:
                received = self._receive()
                if self._calls:
                    return self._calls.popleft()
                if self._over:
                    return None
            if not received:
                pauses.make()

    def _program(self, number: int) -> Program:
        """The program of an evaluator, which came before its first call."""
        if number not in self._programs:
            self._programs[number] = pickle.loads(self._pickled[number])
            del self._pickled[number]
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
        elif status.Get_tag() == END_TAG:
            self._over = True
        else:
            number, kind = kind_of(status.Get_tag())
            if kind is Kind.PROGRAM:
                self._pickled[number] = payload
            else:
                self._calls.append((number, bytes(payload)))
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


def serve_calls() -> None:
    """On a rank that works: run what the root sends, until it says that there is no more."""
    end = WorkerEnd.present
    if end is None:
        raise RuntimeError("this rank serves no evaluator")
    end.serve()
