"""RayChannel: the side channel through Ray, so that it goes wherever Ray's own messages go.

::

    worker ──message──▶ Postbox, an actor ◀──fetch, which waits── channel thread ──▶ receive
           ◀──which runs are to stop, asked for now and then──┘ ◀──ask── request_stop

The actor is on the node of the main program and takes no CPU from the jobs. It ends with the evaluator, and with the
main program, whatever ends that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from evalkit.backends import SideChannel, SideChannelClient

__all__ = ["RayChannel"]

_log = logging.getLogger("evalkit")

_NAMESPACE = "evalkit"
_SEND_TIMEOUT = 30.0  # seconds
_ASK_INTERVAL = 0.2  # seconds between two looks of a worker for requests to stop
_RESTART_PAUSE = 0.2  # seconds before the actor is asked again after it was lost
_CLOSE_TIMEOUT = 2.0  # seconds
_LOOK = 5.0  # seconds between two looks whether Ray is still there: it says nothing when it is shut down

#: One life of the actor, and the number of the first message that was not received in it.
_Position = tuple[str, int]
#: A worker, the number of the message there, and the message. Who repeats one after the loss of the actor cannot know
#: whether it had come through.
_Letter = tuple[str, int, bytes]


class Postbox:
    """The actor in the middle. What it has handed out it keeps until the next call says that it was received."""

    def __init__(self) -> None:
        self._life = uuid.uuid4().hex
        self._letters: list[_Letter] = []
        self._first = 0  # the number of the first one in the list
        self._arrived = asyncio.Event()
        self._stops: set[int] = set()

    async def send(self, letter: _Letter) -> None:
        """Take a message."""
        self._letters.append(letter)
        self._arrived.set()

    async def fetch(self, received: _Position) -> tuple[_Position, list[_Letter]]:
        """Wait for messages beyond those received; return them, and what is received then."""
        life, number = received
        if life == self._life:
            del self._letters[: number - self._first]
            self._first = number
        while not self._letters:
            self._arrived.clear()
            await self._arrived.wait()
        return (self._life, self._first + len(self._letters)), list(self._letters)

    async def position(self) -> _Position:
        """Beyond the last message."""
        return self._life, self._first + len(self._letters)

    async def ask(self, runs: set[int]) -> None:
        """These runs are to stop."""
        self._stops |= runs

    async def forget(self, run: int) -> None:
        """It has ended."""
        self._stops.discard(run)

    async def stops(self) -> set[int]:
        """The runs that are to stop."""
        return self._stops


class RayChannel(SideChannel):
    """The side channel to Ray's workers, wherever they are.

    Args:
        options: of the actor, as ``ray.remote`` takes them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        name = f"evalkit-{uuid.uuid4().hex}"
        self.client = _RayClient(name)
        # It is there when a worker looks for it by name, and starts while the first jobs do.
        self._actor: Any = (
            ray.remote(Postbox).options(name=name, namespace=_NAMESPACE, max_restarts=-1, **options).remote()
        )
        self._lock = threading.Lock()
        self._heard = threading.Condition(self._lock)
        self._received: _Position = ("", 0)
        self._stops: set[int] = set()
        self._last: dict[str, int] = {}  # worker -> the number of its last message
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="evalkit-ray-channel", daemon=True)

    def start(self, receive: Any) -> None:
        self._receive = receive
        self._thread.start()

    def request_stop(self, run: int) -> None:
        self._stops.add(run)
        if ray.is_initialized():  # else it would connect itself, to whatever it finds
            self._actor.ask.remote({run})

    def forget(self, run: int) -> None:
        self._stops.discard(run)
        if not self._closed.is_set() and ray.is_initialized():
            self._actor.forget.remote(run)

    def drain(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if not ray.is_initialized():
            return
        try:
            life, number = self._actor.position.remote().future().result(timeout)
        except Exception:  # noqa: BLE001 - it is gone, and what was in it too
            return
        with self._lock:
            self._heard.wait_for(
                lambda: number == 0 or (self._received[0] == life and self._received[1] >= number),
                max(0.0, deadline - time.monotonic()),
            )

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        if not ray.is_initialized():
            return  # the thread will see
        with contextlib.suppress(Exception):  # Ray may be going away itself
            ray.kill(self._actor)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_TIMEOUT)

    def _serve(self) -> None:
        while not self._closed.is_set() and ray.is_initialized():
            try:
                fetched = self._actor.fetch.remote(self._received).future()
                while not wait([fetched], _LOOK).done:
                    if self._closed.is_set() or not ray.is_initialized():
                        return
                received, letters = fetched.result()
            except Exception as exc:  # noqa: BLE001 - whatever it is, there is nothing to fetch for now
                if self._closed.is_set():
                    return
                _log.warning("the side channel through Ray was lost and is made again: %s", exc)
                self._closed.wait(_RESTART_PAUSE)
                if ray.is_initialized():
                    with contextlib.suppress(Exception):
                        self._actor.ask.remote(set(self._stops))
                continue
            for worker, number, message in letters:
                if number > self._last.get(worker, -1):
                    self._last[worker] = number
                    self._receive(message)
            with self._lock:
                self._received = received
                self._heard.notify_all()


class _RayClient(SideChannelClient):
    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._found: Any = None
        self._sending = threading.Lock()  # held all the while, so that what is repeated stays in order
        self._worker = uuid.uuid4().hex
        self._next_number = 0
        self._stops: set[int] = set()
        self._asking = False
        self._asked = time.monotonic()

    def __reduce__(self) -> tuple[type[_RayClient], tuple[str]]:
        return _RayClient, (self._name,)

    def send(self, message: bytes) -> None:
        deadline = time.monotonic() + _SEND_TIMEOUT
        with self._sending:
            letter = (self._worker, self._next_number, message)
            self._next_number += 1
            while True:
                try:
                    # Not ray.get: it would give the CPU of this task to another one while it waits.
                    self._actor().send.remote(letter).future().result(max(0.0, deadline - time.monotonic()))
                except ActorUnavailableError:
                    if time.monotonic() > deadline:
                        raise ConnectionError("the side channel through Ray was lost") from None
                    time.sleep(_RESTART_PAUSE)  # it is starting again
                except Exception as exc:
                    raise ConnectionError(f"there is no way to the main program from here: {exc}") from exc
                else:
                    return

    def stop_requested(self, run: int) -> bool:
        now = time.monotonic()
        if now - self._asked > _ASK_INTERVAL and not self._asking:
            self._asking = True
            self._asked = now
            try:
                self._actor().stops.remote().future().add_done_callback(self._told)
            except Exception:  # noqa: BLE001 - it is asked again later
                self._asking = False
        return run in self._stops

    def _told(self, answer: Future[Any]) -> None:
        if answer.exception() is None:
            self._stops = answer.result()
        self._asking = False

    def _actor(self) -> Any:
        with self._lock:
            if self._found is None:
                self._found = ray.get_actor(self._name, namespace=_NAMESPACE)
            return self._found
