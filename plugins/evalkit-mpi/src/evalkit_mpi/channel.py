"""The side channel over MPI: what workers say while they run, and requests to stop.

::

    worker ──messages to an evaluator──▶ thread of the session, or one that waits ──▶ receive
           ◀──pairs: an evaluator, and a run of its that is to stop──
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from evalkit.backends import SideChannel, SideChannelClient
from evalkit_mpi.serving import WorkerEnd

if TYPE_CHECKING:
    from evalkit_mpi.session import Session

__all__ = ["MPIChannel"]


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
