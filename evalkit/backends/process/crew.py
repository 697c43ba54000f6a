"""The crew: the workers that there are, their starts and ends, and the wait for whatever happens to them."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterator

from evalkit.backends.process.link import WorkerLink
from evalkit.backends.process.memory import show_bytes
from evalkit.backends.process.nursery import DIED_OF_MEMORY, DIED_UNKNOWN
from evalkit.backends.process.spawner import TERM_GRACE, Death, Spawner
from evalkit.job import ErrorInfo, JobCause

__all__ = ["Crew", "describe_death"]


class Crew:
    """The workers of a pool. All but ``wait`` and ``wake`` is called with the pool's lock held.

    Args:
        size: how many workers there are to be.
        setup: the parts of the message that tells a worker what to run.
        start_timeout: seconds after which a worker that is not ready is killed.
        job_memory: bytes that a worker may take, with what it started; None for no limit.
        capture: whether what jobs print is captured.

    Raises:
        BackendError: no process can be started.

    Attributes:
        links: number -> worker.
    """

    def __init__(
        self,
        size: int,
        setup: list[bytes | memoryview],
        start_timeout: float,
        job_memory: int | None = None,
        capture: bool = False,
    ) -> None:
        self._size = size
        self._setup = setup
        self._start_timeout = start_timeout
        self._job_memory = job_memory
        self._capture = capture
        self._next_number = 0
        self._kills: list[tuple[float, int]] = []  # (when to SIGKILL, number)
        self.links: dict[int, WorkerLink] = {}
        self._spawner = Spawner(size, job_memory)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._selector.register(self._spawner, selectors.EVENT_READ)

    # -- waiting --------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None) -> tuple[list[WorkerLink], bool]:
        """Wait until something happens, at most ``timeout`` seconds.

        Returns:
            the workers that sent something, and whether the nursery has something to say.
        """
        links, nursery = [], False
        for key, mask in self._selector.select(timeout):
            if isinstance(key.data, WorkerLink):
                if mask & selectors.EVENT_READ:
                    links.append(key.data)
            elif key.fileobj is self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    while self._wake_read.recv(4096):
                        pass
            else:
                nursery = True
        return links, nursery

    def wake(self) -> None:
        """Have :meth:`wait` return; from any thread."""
        with contextlib.suppress(OSError):  # a full pipe wakes as well
            self._wake_write.send(b"\0")

    def deaths(self) -> Iterator[Death]:
        """The workers that have ended. Raises ``EOFError`` if the nursery has."""
        return self._spawner.deaths()

    # -- starts ---------------------------------------------------------------------------------------------------

    def fill_up(self) -> None:
        """Start as many workers as are missing."""
        while len(self.links) < self._size:
            link = WorkerLink(self._next_number, capture=self._capture)
            self._next_number += 1
            self.links[link.number] = link
            self._selector.register(link.sock, selectors.EVENT_READ, link)
            self._spawner.spawn(link.number, link.fds_for_worker)
            link.close_theirs()
            link.send_parts(self._setup)

    def restart(self) -> None:
        """Start another nursery, for one that is gone. Raises ``BackendError``."""
        self._selector.unregister(self._spawner)
        self._spawner.close()
        self._spawner = Spawner(self._size, self._job_memory)
        self._selector.register(self._spawner, selectors.EVENT_READ)

    # -- ends -----------------------------------------------------------------------------------------------------

    def kill(self, link: WorkerLink, job_id: str | None) -> None:
        """End a worker with all that it started, because of a job: SIGTERM now, SIGKILL after :data:`TERM_GRACE`."""
        if link.doomed is None:
            link.doomed = job_id or ""
            self._spawner.signal(link.number, signal.SIGTERM)
            self._kills.append((time.monotonic() + TERM_GRACE, link.number))

    def kill_group(self, link: WorkerLink) -> None:
        """End what a worker has left, where no nursery is there to do it; what moved to other groups is lost to us."""
        if link.identity is not None:
            with contextlib.suppress(OSError):
                os.killpg(link.identity.pid, signal.SIGKILL)

    def stop_listening(self, link: WorkerLink) -> None:
        """It sends nothing more; the nursery will tell how it ended."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(link.sock)

    def remove(self, link: WorkerLink) -> None:
        """It has ended."""
        self.stop_listening(link)
        del self.links[link.number]
        link.close()

    def close(self) -> None:
        """Kill what is left, with all that it started, and let go of everything."""
        self._spawner.close()
        self._selector.close()
        for link in self.links.values():
            link.close()
        self.links.clear()
        self._wake_read.close()
        self._wake_write.close()

    # -- what is due by the clock ---------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When, on the monotonic clock, :meth:`keep_up` has something to do; None for never."""
        deadlines = [when for when, _ in self._kills]
        deadlines += [link.born + self._start_timeout for link in self.links.values() if link.identity is None]
        return min(deadlines, default=None)

    def keep_up(self) -> None:
        """Do what is due, and write what the sockets had no room for."""
        if self._kills:
            now = time.monotonic()
            for _, number in [kill for kill in self._kills if kill[0] <= now]:
                self._spawner.signal(number, signal.SIGKILL)
            self._kills = [kill for kill in self._kills if kill[0] > now and kill[1] in self.links]
        for link in self.links.values():
            if link.identity is None and time.monotonic() - link.born > self._start_timeout:
                self.kill(link, None)
            if link.wants_write:
                link.flush()
            if link.wants_write is not link.listens_for_room:
                link.listens_for_room = link.wants_write
                mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_write else 0)
                with contextlib.suppress(KeyError):
                    self._selector.modify(link.sock, mask, link)


def describe_death(link: WorkerLink, death: Death, job_memory: int | None) -> tuple[JobCause, ErrorInfo]:
    """How a worker ended, and what that is for the job it was on."""
    who = f"worker process {link.identity.pid}" if link.identity is not None else "a worker process that was starting"
    if not os.WIFSIGNALED(death.status):
        code = os.waitstatus_to_exitcode(death.status)
        return JobCause.CRASH, ErrorInfo("WorkerDied", f"{who} exited with code {code}", exit_code=code)
    number = os.WTERMSIG(death.status)
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if death.reason > 0 and job_memory is not None:
        took = f"{who}, with what it had started, took {show_bytes(death.reason)}"
        message = f"{took}, more than job_memory={show_bytes(job_memory)}, and was killed"
        return JobCause.MEMORY, ErrorInfo("JobMemoryExceeded", message, signal=name)
    message = f"{who} was killed by {name}"
    if death.reason == DIED_OF_MEMORY:
        message += ": the kernel was out of memory and killed it (its count of such kills has risen)"
        return JobCause.MEMORY, ErrorInfo("OutOfMemory", message, signal=name)
    if death.reason == DIED_UNKNOWN:
        message += "; whether by the kernel, for want of memory, this machine does not say"
    return JobCause.CRASH, ErrorInfo("WorkerDied", message, signal=name)
