"""The jobs of a chunk, as a worker of an executor runs them.

::

    call ──chunk──▶ waiting ──▶ running ──▶ ended ──▶ outcome, which the call returns
                       │           │          │
                  given back    started    held for long      over the side channel, by the ticker

The thread of the call runs one job after the other. A ticker thread looks every half of ``hold``: what has ended by
then is sent, so that no result waits for its chunk mates; and if it sees the same job twice, it tells of its start and
gives back the jobs behind it. So a job that takes longer than ``hold`` is alone in its call, whatever was expected.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evalkit.backends.base import RunFunction
from evalkit.backends.chunk_wire import PLAIN, Entries, Kind, Message, Outcome, Packed, Saying, pack
from evalkit.backends.events import Measured, WorkerIdentity
from evalkit.backends.execution import describe, take_all, visible
from evalkit.backends.meter import Meter, Ran
from evalkit.backends.serialization import dumps, explain, loads
from evalkit.backends.side_channel import SideChannelClient
from evalkit.errors import SerializationError
from evalkit.job import ErrorInfo
from evalkit.running import Channel, RunningJob, is_coroutine_function

__all__ = ["ChunkRun", "Place", "Ticker", "WorkerThread"]

_FORK_TAKES = 2e-5  # seconds, at least
_REPORT_INTERVAL = 0.02  # seconds; progress that comes faster is merged
_MAX_HELD_BYTES = 2**20  # of outputs, before they are sent
_QUIET_TICKS = 20  # without anything to do, before the ticker sleeps until it is called

#: As ``Ran``, of a job that was not run: its function or its arguments cannot be rebuilt.
_NotRun = tuple[None, ErrorInfo, None]


@dataclass(frozen=True, slots=True)
class Place:
    """What the chunks of one program have in common in this process.

    Attributes:
        client: the worker's end of the side channel, if there is one.
        hold: seconds that what has ended may wait for its chunk mates.
        prompt: whether each start is told before the job runs.
        same_memory: whether who submits is in this process too.
        ticker: None without a side channel.
        pid: of this process.
    """

    client: SideChannelClient | None
    hold: float
    prompt: bool
    same_memory: bool
    ticker: Ticker | None
    pid: int


class WorkerThread:
    """A thread that runs jobs: what it keeps from one to the next."""

    def __init__(
        self,
        function: RunFunction,
        worker_init: Callable[[], Any] | None,
        unfit: BaseException | None,
        worker: WorkerIdentity,
    ) -> None:
        self.worker = worker
        self._function = function
        self._call = self._await if is_coroutine_function(function) else function
        self._runner: asyncio.Runner | None = None
        self._unfit = unfit
        self._meter = Meter()
        self._state: Any = None
        if worker_init is not None and unfit is None:
            try:
                self._state = worker_init()
            except BaseException as exc:  # noqa: BLE001 - each job says so
                self._unfit = exc

    def run(
        self, channel: Channel, job_id: str, attempt: int, args: Any, resources: dict[str, str] | None = None
    ) -> Ran | _NotRun:
        if self._unfit is not None:
            return None, describe(self._unfit), None
        if type(args) is Packed:
            try:
                args = loads(args)
            except BaseException as exc:  # noqa: BLE001 - a user's __setstate__ may do anything
                exc.add_note("The arguments of the job could not be rebuilt in the worker.")
                return None, describe(exc), None
        return self._meter.run(self._call, RunningJob(args, job_id, attempt, channel, self._state, resources))

    def rest(self) -> None:
        """No job runs for now: a loop is not kept, since nobody may be there to close it later."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            runner.close()

    def _await(self, job: RunningJob) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        try:
            return self._runner.run(self._function(job))
        except (SystemExit, KeyboardInterrupt):
            # One of its tasks broke out of the loop; what it left there must not go on under the next job.
            broken, self._runner = self._runner, None
            broken.close()
            raise


class ChunkRun:
    """The run of one chunk, and the channel of the jobs in it.

    What the thread of the call and the ticker both take from are deques: each entry goes to one of them.
    """

    def __init__(
        self,
        place: Place,
        thread: WorkerThread,
        number: int,
        entries: Entries,
        resources: dict[int, dict[str, str]] | None,
    ) -> None:
        self._place = place
        self._thread = thread
        self._number = number
        self._resources = resources  # of each job, by its index, if they have any
        self._waiting = deque(zip(*entries, strict=True))
        self._ended: deque[Saying] = deque()
        self._held_bytes = 0
        self._client = place.client
        self._mute = False  # a message could not be sent, so no more are
        self._sending = threading.Lock()
        self._messages = 0
        self._closed = False
        # The job that runs: its index and id, and since when.
        self._index = -1
        self._job_id: str | None = None
        self._since = 0.0
        self._seen = -1  # the index at the last tick
        self._told = -1  # the index of which the start was told
        self._judged = -1  # the index that took longer than a tick
        self._progress: tuple[int, float, str] | None = None
        self._reported = 0.0

    # -- in the thread of the call --------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Run all of them."""
        begin = time.perf_counter()
        sent = now = time.time()
        jobs = 0  # that ran; each begins at what is ``now`` when the one before is over
        client, waiting, ended, place = self._client, self._waiting, self._ended, self._place
        while waiting:
            try:
                index, job_id, attempt, args = waiting.popleft()
            except IndexError:  # they were given back
                break
            if client is not None and client.stop_requested(self._number + index):
                ended.append((Kind.SKIPPED, index))
                continue
            jobs += 1
            self._since = now
            self._index, self._job_id = index, job_id
            if place.prompt:
                self._tell_start(index)
            if self._resources is None:
                output, error, measured = self._thread.run(self, job_id, attempt, args)
            else:
                output, error, measured = self._run_with(self._resources[index], job_id, attempt, args)
            self._job_id = None
            now = (measured and measured[1]) or time.time()
            if not 0.0 <= now - self._since < _FORK_TAKES and os.getpid() != place.pid:
                os._exit(0)  # the user's function forked, and this is the child
            if self._progress is not None:
                ended.append((Kind.PROGRESS, *self._progress))
                self._progress = None
            if error is None and (place.same_memory or type(output) in PLAIN):
                ended.append((Kind.DONE, index, output, measured))
            else:
                if place.prompt and measured is not None:
                    self._say((Kind.ENDED, index, measured))
                ended.append(self._pack(index, output, error, measured))
                now = time.time()
            if now - sent > place.hold or self._held_bytes > _MAX_HELD_BYTES:
                if waiting:
                    self.flush()
                sent = now = time.time()
        self._thread.rest()
        with self._sending:
            self._closed = True
            return Outcome(self._messages, jobs, time.perf_counter() - begin, tuple(ended), self._thread.worker)

    def _run_with(self, resources: dict[str, str], job_id: str, attempt: int, args: Any) -> Ran | _NotRun:
        # The environment of a process that we share belongs to all.
        with contextlib.nullcontext() if self._place.same_memory else visible(resources):
            return self._thread.run(self, job_id, attempt, args, resources)

    def _pack(self, index: int, output: Any, error: ErrorInfo | None, measured: Measured | None) -> Saying:
        if error is not None:
            return (Kind.FAILED, index, error, measured)
        try:
            packed = Packed(dumps(output, "output"))
        except SerializationError as exc:
            return (Kind.FAILED, index, describe(explain(output, "output", exc.__cause__ or exc)), measured)
        self._held_bytes += len(packed)
        return (Kind.DONE, index, packed, measured)

    # -- the channel of the jobs ----------------------------------------------------------------------------------

    def progress(self, job_id: str, progress: float, phase: str) -> None:
        index = self._index
        if job_id != self._job_id:
            return  # a thread that a job left behind
        self._progress = (index, progress, phase)
        ticker = self._place.ticker
        if ticker is not None:
            now = time.monotonic()
            if now - self._reported >= _REPORT_INTERVAL:
                self._report(now)
            else:
                ticker.poke()

    def record(self, job_id: str, values: dict[str, Any]) -> None:
        index = self._index
        if job_id != self._job_id:
            return
        same_memory = self._place.same_memory
        packed = values if same_memory else Packed(dumps(values, "recorded values"))
        self._say((Kind.RECORDED, index, packed))

    def stop_requested(self, job_id: str) -> bool:
        index = self._index
        return self._client is not None and job_id == self._job_id and self._client.stop_requested(self._number + index)

    # -- saying it ------------------------------------------------------------------------------------------------

    def tick(self) -> bool:
        """Say what is due; return whether more may be due soon, without anything being done here."""
        index = self._index
        if self._job_id is None or index != self._seen:
            self._seen = index
            self.flush()
            return True
        if self._judged != index:
            self._judged = index
            with self._sending:
                if self._closed:
                    return False
                behind = take_all(self._waiting)
                back: list[Saying] = [(Kind.RETURNED, entry[0]) for entry in behind]
                if not self._send([*take_all(self._ended), *self._start_of(index), *back]):
                    self._waiting.extend(behind)  # they run here after all
            return True
        if self._progress is None:
            return False
        now = time.monotonic()
        if now - self._reported >= _REPORT_INTERVAL:
            self._report(now)
        return True

    def flush(self) -> None:
        """Send what has ended."""
        with self._sending:
            if self._ended and not self._closed:
                self._send(take_all(self._ended))
                self._held_bytes = 0

    def _start_of(self, index: int) -> list[Saying]:
        """With the lock: that a job has started, once."""
        if self._told == index:
            return []
        self._told = index
        return [(Kind.STARTED, index, self._since)]

    def _tell_start(self, index: int) -> None:
        with self._sending:
            if sayings := self._start_of(index):
                self._send(sayings)

    def _report(self, now: float) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            self._reported = now
            self._say((Kind.PROGRESS, *progress))

    def _say(self, saying: Saying) -> None:
        """Say something of the job that runs, at once."""
        with self._sending:
            if not self._closed:
                self._send([*self._start_of(saying[1]), saying])

    def _send(self, sayings: list[Saying]) -> bool:
        """With the lock: send it, or have it come with the result; say whether it was sent."""
        if self._client is not None and not self._mute and os.getpid() == self._place.pid:
            message: Any = Message(self._number, sayings, self._thread.worker)
            try:
                self._client.send(message if self._place.same_memory else pack(message))
            except OSError:
                self._mute = True  # if the master has gone, the jobs still hear that they are to stop
            else:
                self._messages += 1
                return True
        self._ended.extend(saying for saying in sayings if saying[0] != Kind.RETURNED)
        return False


class Ticker:
    """One thread for all chunks that run in this process."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._runs: set[ChunkRun] = set()
        self._wake = threading.Event()
        self._asleep = True
        self._stopped = False
        self._thread: threading.Thread | None = None

    def add(self, one: ChunkRun) -> None:
        self._runs.add(one)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="evalkit-ticker", daemon=True)
            self._thread.start()
        self.poke()

    def remove(self, one: ChunkRun) -> None:
        self._runs.discard(one)

    def poke(self) -> None:
        """There may be something to say."""
        if self._asleep:
            self._wake.set()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def _serve(self) -> None:
        quiet = 0
        while not self._stopped:
            busy = False
            for one in tuple(self._runs):
                busy |= one.tick()
            quiet = 0 if busy else quiet + 1
            if quiet < _QUIET_TICKS:
                time.sleep(self._interval)
                continue
            # Who comes from now on wakes us; who came before is seen in one more round.
            self._wake.clear()
            self._asleep = True
            if not any(one.tick() for one in tuple(self._runs)):
                self._wake.wait()
            self._asleep = False
            quiet = 0
