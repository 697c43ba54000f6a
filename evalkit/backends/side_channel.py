"""The side channel of an executor: what workers say while a call still runs, and requests to stop.

The master has a :class:`SideChannel`; its :attr:`~SideChannel.client` travels to the workers. Whoever brings an engine
whose workers are on other machines writes both; for those on this machine there is
:class:`evalkit.backends.socket_channel.SocketChannel`, a Unix socket in a folder that only this user can enter.

The master unpickles the messages, so a channel has to keep out everybody but its workers: by the rights of a file or
by the engine's own authentication. A token that travels over an open port is not enough.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

__all__ = ["DirectChannel", "Receive", "SideChannel", "SideChannelClient"]

#: Takes one message of a worker.
Receive = Callable[[Any], None]


class SideChannelClient(ABC):
    """The worker's end. It is pickled by reference, once for each worker; several threads may use it.

    It opens what it needs at its first use, not when it is unpickled.
    """

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Send a message to the master, who gets each message once, and those of one thread in order.

        What was sent is not lost when this process dies right after.

        Raises:
            OSError: it cannot be sent, now or ever again; what is not sent comes with the result of the call.
        """

    @abstractmethod
    def stop_requested(self, run: int) -> bool:
        """Whether the master wants this run to stop. Called before each job and often within: it has to be cheap.

        Ask the network now and then at most, and remember; never raise.
        """

    def close(self) -> None:
        """The worker has no more use for it."""
        return


class SideChannel(ABC):
    """The master's end.

    Attributes:
        client: the worker's end.
    """

    client: SideChannelClient

    @abstractmethod
    def start(self, receive: Receive) -> None:
        """Get ready, and call ``receive(message)`` from a thread of the channel for each message that a worker sends.

        ``receive`` never raises. It is called before any client is used, and once.
        """

    @abstractmethod
    def request_stop(self, run: int) -> None:
        """Let the worker that runs, or will run, ``run`` know that it is to stop. Does not wait.

        Args:
            run: the number of one run of one job; no number is used twice.
        """

    def forget(self, run: int) -> None:
        """A run that was asked to stop has ended."""
        return

    def drain(self, timeout: float) -> None:
        """Receive what workers have sent by now, and return; called when one has died, for what it said last.

        Args:
            timeout: seconds that this may take.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """Release everything; nothing is received any more. May be called twice."""


class DirectChannel(SideChannel):
    """The channel to workers that share this process' memory."""

    def __init__(self) -> None:
        self.client = self._end = _DirectClient()

    def start(self, receive: Receive) -> None:
        self._end.receive = receive

    def request_stop(self, run: int) -> None:
        self._end.request_stop(run)

    def forget(self, run: int) -> None:
        self._end.forget(run)

    def close(self) -> None:
        return


class _DirectClient(SideChannelClient):
    def __init__(self) -> None:
        self.receive: Receive = _ignore
        self._lock = threading.Lock()
        self._stops: set[int] = set()

    def send(self, message: Any) -> None:
        self.receive(message)

    def stop_requested(self, run: int) -> bool:
        return run in self._stops

    def request_stop(self, run: int) -> None:
        with self._lock:
            self._stops.add(run)

    def forget(self, run: int) -> None:
        with self._lock:
            self._stops.discard(run)


def _ignore(_message: Any) -> None:
    return
