"""ExecutorBackend: the door for engines that offer a ``concurrent.futures.Executor``.

::

    dispatch ──▶ waiting ──chunks──▶ calls, one a worker ──▶ executor ══▶ worker (chunk_run.py)
                    ▲                   │        ▲                                  │
                    ├─ given back ◀─────┤        └── result of the call ◀───────────┤
                    └─ suspects, alone ◀┘            messages ◀── side channel ◀────┘

No more calls are in the executor than it has workers, so what is in it runs, and what waits is in our hands: it can be
cancelled, and goes to whoever is free first. The next call goes out before the result of the last one is read.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from functools import partial
from typing import Any

from evalkit.backends.base import Backend, Capabilities, Emit, RunFunction, Task
from evalkit.backends.batching import ChunkSizer
from evalkit.backends.chunk import Program, Setup
from evalkit.backends.chunk_wire import (
    Ends,
    Kind,
    Message,
    Outcome,
    pack_tasks,
    read_ends,
    read_saying,
    unpack_message,
    unpack_outcome,
)
from evalkit.backends.events import Cancelled, Event, Failed, Lost, Released, Rerun, Started
from evalkit.backends.execution import check_worker_init, describe, failed
from evalkit.backends.executor_call import Call, Fault, Reach, sort_out
from evalkit.backends.executor_threads import Mender, before_executors_wait
from evalkit.backends.serialization import dumps
from evalkit.backends.side_channel import DirectChannel, SideChannel
from evalkit.backends.socket_channel import SocketChannel
from evalkit.errors import BackendError, SerializationError
from evalkit.job import ErrorInfo, JobCause

__all__ = ["ExecutorBackend"]

_log = logging.getLogger("evalkit")

_DRAIN = 2.0  # seconds that the last words of a dead worker may take
_LATE = 10.0  # seconds that a result waits for messages which were sent before it
_EXIT_GRACE = 2.0  # seconds that jobs have when the program ends without a close


class ExecutorBackend(Backend):
    """A backend of which an author writes ``make_executor()``; all the rest is here.

    Functions, arguments and outputs travel as evalkit's own pickles (by value where they cannot be imported), unless
    the workers share this process' memory (``capabilities.same_memory``). An executor carries bytes, and is given
    ``submit(program, chunk)`` and no more: at most as many calls at once as there are workers, and each starts at once.

    Cheap jobs travel together in a call, so that its cost is a small part of the time. How many follows what calls and
    jobs are measured to take. Jobs that are known to be slow, and all jobs where there is a ``job_timeout``, travel
    alone; a job that turns out to be slow gives back the jobs behind it. Chunks need a side channel
    (:meth:`make_channel`), over which what has ended is told after ``hold`` seconds, and progress, records and requests
    to stop flow while a call runs; a backend that has one says ``streams=True``.

    When an executor breaks (``BrokenExecutor``), another is made, and the jobs that were running in it run again one at
    a time, so that the one that breaks it is known and the others finish. What had ended in a chunk and was told is not
    among them. An author whose engine knows more overrides :meth:`blame`, and one that can end a job :meth:`kill`.

    Args:
        num_workers: how many calls run at once.
        worker_init: called once in each worker (process, or thread where they share our memory) before its first job;
            what it returns is ``job.worker_state``.
        batching: whether several jobs may travel in a call.
        hold: seconds that a result may be held back by others of its call, as long as these let other threads of their
            process run.
    """

    capabilities = Capabilities(by_value=True, streams=True)

    def __init__(
        self,
        num_workers: int,
        *,
        worker_init: Callable[[], Any] | None = None,
        batching: bool = True,
        hold: float = 0.010,
    ) -> None:
        super().__init__(num_workers)
        check_worker_init(worker_init)
        if type(batching) is not bool:
            raise TypeError(f"batching takes True or False, not {batching!r}")
        if not isinstance(hold, int | float) or not 0.001 <= hold <= 3600:
            raise ValueError(f"hold takes seconds, at least 0.001, not {hold!r}")
        self._worker_init = worker_init
        self._batching = batching
        self._hold = float(hold)
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)  # a call has left
        self._waiting: deque[Task] = deque()
        self._alone: deque[Task] = deque()  # to travel alone, since one of them is to blame for the end of a call
        self._suspects: deque[Task] = deque()  # to run with nothing else in the executor
        self._trial = False  # a suspect runs
        self._fallen: list[tuple[Call, Fault]] = []  # were in an executor when it broke
        self._untold = 0  # rounds of events that have to be told before anything else is sent
        self._calls: dict[int, Call] = {}  # by the number of their first run
        self._busy = 0  # calls that hold a worker
        self._next_number = 0
        self._executor: Executor | None = None
        self._watched: Executor | None = None  # its wait at the end of the program comes after our stop
        self._stopping = False
        self._mender = Mender(self._mend, self._conclude, _LATE)

    # -- what an author writes ------------------------------------------------------------------------------------

    @abstractmethod
    def make_executor(self) -> Executor:
        """A new executor with ``num_workers`` workers. Called at the start, and again whenever one has broken.

        What it raises at the start is raised by ``Evaluator.create``.
        """

    def make_channel(self) -> SideChannel | None:
        """The way back while calls run, made once at the start; None if there is none, and then each job travels alone.

        By default it is direct where the workers share our memory, a Unix socket that only this user can reach where
        they are on this machine, and there is none where the backend says that it spans nodes.
        """
        if self.capabilities.same_memory:
            return DirectChannel()
        if self.capabilities.spans_nodes:
            return None
        try:
            return SocketChannel()
        except OSError as exc:
            raise BackendError(f"the socket for the workers cannot be made in the temporary folder: {exc}") from exc

    @staticmethod
    def worker_name() -> str:
        """The name of the worker in which this is called, as it is in the metadata of its jobs."""
        return f"worker-{os.getpid()}"

    def blame(self, exc: BaseException) -> Fault:
        """What an exception with which a call ended means: it is the engine's, since those of jobs are results.

        By default, ``BrokenExecutor`` means that the executor is broken, and everything else is the fault of a job.
        """
        if isinstance(exc, BrokenExecutor):
            return Fault(Reach.EXECUTOR, JobCause.CRASH, ErrorInfo("WorkerDied", f"the worker it ran in died: {exc}"))
        return Fault(Reach.CALL, JobCause.EXCEPTION, describe(exc))

    def kill(self, future: Future[Any]) -> bool:
        """End what runs in this call, now, by force; say whether that is done. Its future then ends with an exception.

        By default nothing can be ended: the job is abandoned, and keeps its worker until it returns.
        """
        return False

    def shut_executor(self, executor: Executor, grace: float) -> None:
        """Let an executor go, whatever still runs in it.

        Args:
            grace: seconds that this may wait for workers that have nothing to do; 0 for one that is broken.
        """
        executor.shutdown(wait=False, cancel_futures=True)

    # -- what the evaluator calls ---------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        # As much again waits behind what runs, so that no worker waits for the evaluator.
        return 2 * self.num_workers * self._sizer.size

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        self._emit = emit
        self._unfit: ErrorInfo | None = None
        self._channel = self.make_channel()
        # Without a way to tell what has ended, and to give back what waits, one slow job would keep its mates.
        self._sizer = ChunkSizer(self._batching and self._channel is not None and self.job_timeout is None)
        self._program = self._make_program(run_function)
        try:
            if self._channel is not None:
                self._channel.start(self._receive)
            self._executor = self.make_executor()
            before_executors_wait(self._stop_at_exit)
        except BaseException as exc:
            self._release()
            if isinstance(exc, BackendError) or not isinstance(exc, Exception):
                raise
            raise BackendError(f"{type(self).__name__} cannot start: {type(exc).__name__}: {exc}") from exc

    def _make_program(self, run_function: RunFunction) -> Program:
        client = None if self._channel is None else self._channel.client
        prompt = self.job_timeout is not None
        if self.capabilities.same_memory:
            name = _name_of_thread
            return Program(Setup(run_function, self._worker_init, name, client, self._hold, prompt))
        pickles = []
        for value, name_of_value in ((run_function, "run_function"), (self._worker_init, "worker_init")):
            try:
                pickles.append(dumps(value, name_of_value, function=True))
            except SerializationError as exc:
                self._unfit = describe(exc)  # the jobs fail with this, one by one; a failed job is a result
                pickles.append(b"")
        setup = Setup(pickles[0], pickles[1], self.worker_name, client, self._hold, prompt)
        return Program(dumps(setup, "setup"))

    @property
    def executor(self) -> Executor | None:
        """The one that is used now."""
        return self._executor

    @property
    def program(self) -> Program:
        """What every call is given, for engines that can hold it in their workers."""
        return self._program

    def dispatch(self, tasks: Sequence[Task]) -> None:
        with self._lock:
            self._waiting.extend(tasks)
        self._send()

    def cancel(self, job_id: str, kill: bool) -> None:
        with self._lock:
            dropped = any(_remove(queue, job_id) for queue in (self._waiting, self._alone, self._suspects))
            call, index = (None, 0) if dropped else self._find(job_id)
            if call is not None:
                call.ask_to_stop(index, self._channel)
                if kill:
                    call.doomed.add(index)
        if dropped:
            self._emit([Cancelled(job_id)])
        elif call is not None and call.future is not None and kill and not self.kill(call.future):
            self._abandon(call, index)
        self._send()

    def _find(self, job_id: str) -> tuple[Call | None, int]:
        for call in self._calls.values():
            for index, task in call.tasks.items():
                if task.id == job_id:
                    return call, index
        return None, 0

    def _abandon(self, call: Call, index: int) -> None:
        with self._lock:
            task = call.tasks.pop(index, None)
            if task is not None and task.resources:
                call.abandoned.append(Released(task.id, task.attempt))
            self._settled.notify_all()
        if task is not None:
            error = ErrorInfo("Abandoned", "this backend cannot end a running job, so it was abandoned")
            self._emit([Failed(task.id, JobCause.LOST, error, abandoned=True)])

    def stop(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        with self._lock:
            if self._stopping:
                return  # when the program ended
            self._stopping = True
            for queue in (self._waiting, self._alone, self._suspects):
                queue.clear()
            for call in self._calls.values():
                for index in call.tasks:
                    call.ask_to_stop(index, self._channel)
            self._settled.wait_for(lambda: not any(call.tasks for call in self._calls.values()), grace)
            left = [call.future for call in self._calls.values() if call.future is not None]
        for future in left:
            self.kill(future)
        if self._executor is not None:
            self.shut_executor(self._executor, max(1.0, deadline - time.monotonic()))
            self._executor = None
        self._release()

    def _stop_at_exit(self) -> None:
        """The program ends without a close."""
        if not self._stopping:
            self.stop(_EXIT_GRACE)

    def _release(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._program.discard()
        self._mender.close()

    # -- sending --------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Fill the workers that are free."""
        served = 0
        while self._waiting or self._alone or self._suspects:
            events: list[Event] = []
            with self._lock:
                tasks = self._take_next(served)
                served += 1
                if not tasks:
                    return
                call = self._submit(tasks, events)
            if events:
                self._emit(events)
            if call is not None and call.future is not None:
                call.future.add_done_callback(partial(self._ended, call))

    def _take_next(self, served: int) -> list[Task]:
        """With the lock: the jobs that go out in the next call, if one may go out; so many went out just before."""
        if self._stopping or self._fallen or self._untold or self._trial or self._busy >= self.num_workers:
            return []
        if self._suspects:
            if self._busy:
                return []
            self._trial = True
            return [self._suspects.popleft()]
        if self._alone:
            return [self._alone.popleft()]
        if not self._waiting:
            return []
        count = self._sizer.share(len(self._waiting), self.num_workers - served, self._busy > served)
        return [self._waiting.popleft() for _ in range(count)]

    def _submit(self, tasks: list[Task], events: list[Event]) -> Call | None:
        """With the lock: make a call of these jobs; what cannot be sent is in the events."""
        if self._unfit is not None:
            events += [Failed(task.id, JobCause.EXCEPTION, self._unfit) for task in tasks]
            self._trial = False
            return None
        call = Call(self._next_number)
        same_memory = self.capabilities.same_memory
        entries, bad, left = pack_tasks(tasks, same_memory)
        events += [failed(task.id, exc, None, None) for task, exc in bad]
        self._waiting.extendleft(reversed(left))
        indices = entries[0]
        if not indices:
            self._trial = False
            return None
        call.tasks = dict(zip(indices, map(tasks.__getitem__, indices), strict=True))
        # Either all tasks have resources or none has.
        resources = {position: tasks[position].resources for position in call.tasks} if tasks[0].resources else None
        chunk = (call.number, entries, resources)
        call.future = self._submit_chunk(chunk if same_memory else pickle.dumps(chunk, 5), call, events)
        if call.future is None:
            self._trial = False
            return None
        self._next_number += len(tasks)
        self._calls[call.number] = call
        self._busy += 1
        if self._channel is None:
            # Nobody will tell, and there is a worker for it.
            now = time.time()
            events += [Started(task.id, now) for task in call.tasks.values()]
            call.started |= call.tasks.keys()
        return call

    def _submit_chunk(self, chunk: Any, call: Call, events: list[Event]) -> Future[Any] | None:
        error = None
        for _ in range(2):
            executor = self._executor
            try:
                if executor is None:
                    executor = self._executor = self.make_executor()
                call.executor = executor
                call.sent = time.perf_counter()
                future = executor.submit(self._program, chunk)
            except Exception as exc:  # noqa: BLE001 - it is broken, or was shut down behind our back: a new one, once
                error = describe(exc)
                self._executor = None
                if executor is not None:
                    self._let_go(executor)
            else:
                if executor is not self._watched:
                    self._watched = executor
                    before_executors_wait(self._stop_at_exit)
                return future
        if error is not None:
            events += [Failed(task.id, JobCause.LOST, error) for task in call.tasks.values()]
        return None

    def _let_go(self, executor: Executor) -> None:
        """With the lock: a broken executor has no more use."""
        try:
            self.shut_executor(executor, 0.0)
        except Exception:  # noqa: BLE001 - it is broken
            _log.exception("a broken executor cannot be shut down")

    # -- receiving ------------------------------------------------------------------------------------------------

    def _receive(self, data: Any) -> None:
        """A message over the side channel."""
        try:
            message = unpack_message(data) if isinstance(data, bytes) else data
        except Exception:  # noqa: BLE001 - a defect, of ours or of a channel
            _log.exception("a message of a worker cannot be read")
            return
        with self._lock:
            call = self._calls.get(message.number)
            if call is None:
                return
            events = self._read(call, message)
        if events:
            self._emit(events)
        with self._lock:
            call.received += 1
            outcome = call.outcome
            complete = outcome is not None and call.received >= outcome.messages
        if outcome is not None and complete:
            self._conclude(call, outcome)
        self._send()

    def _read(self, call: Call, said: Message | Outcome) -> Sequence[Event]:
        """With the lock: what a worker says as events; what it gave back is put first in line."""
        tasks, worker = call.tasks, said.worker
        if isinstance(said.sayings, Ends):
            return read_ends(tasks, said.sayings, worker)
        events: list[Event] = []
        back = []
        for saying in said.sayings:
            kind, index = saying[0], saying[1]
            task = tasks.get(index)
            if task is None:
                continue  # it was abandoned
            if kind == Kind.DONE or kind == Kind.FAILED:
                del tasks[index]
                events.append(read_saying(task.id, saying, worker))
            elif kind == Kind.RETURNED:
                del tasks[index]
                if index in call.asked:
                    events.append(Cancelled(task.id))
                else:
                    back.append(task)
            elif kind == Kind.SKIPPED:
                del tasks[index]
                events.append(Cancelled(task.id))
            else:
                if kind == Kind.STARTED:
                    call.started.add(index)
                events.append(read_saying(task.id, saying, worker))
        if back and not self._stopping:
            self._waiting.extendleft(reversed(back))
        return events

    def _ended(self, call: Call, future: Future[Any]) -> None:
        """The future of a call has ended."""
        round_trip = time.perf_counter() - call.sent
        try:
            result = future.result()
            outcome = unpack_outcome(result) if isinstance(result, bytes) else result
        except CancelledError:
            self._mender.put(call, BrokenExecutor("the engine cancelled the call"))
            return
        except BaseException as exc:  # noqa: BLE001 - of the engine; what a job raises is a result
            self._mender.put(call, exc)
            return
        with self._lock:
            self._sizer.note(outcome.jobs, outcome.seconds, round_trip)
            self._leave(call)
            call.outcome = outcome
            complete = call.received >= outcome.messages
            events = self._settle_fallen()
        self._tell(events)
        self._send()
        if complete:
            self._conclude(call, outcome)
            self._send()
        else:
            self._mender.put(call, outcome)

    def _leave(self, call: Call) -> None:
        """With the lock: a call holds its worker no longer."""
        if not call.left:
            call.left = True
            self._busy -= 1
            self._trial = False

    def _conclude(self, call: Call, outcome: Outcome) -> None:
        """Tell what a call has brought, after all that was said before."""
        with self._lock:
            if self._calls.pop(call.number, None) is None:
                return
            events = self._read(call, outcome)
            if call.tasks and not self._stopping:
                reason = "what its worker said of its end was lost on the way"
                events = [*events, *(Lost(task.id, reason) for task in call.tasks.values())]
        if events:
            self._emit(events)
        self._forget(call)

    def _forget(self, call: Call) -> None:
        """The last of a call."""
        if call.abandoned:
            self._emit(call.abandoned)
        if self._channel is not None:
            for index in call.asked:
                self._channel.forget(call.number + index)
        if self._stopping:
            with self._lock:
                self._settled.notify_all()

    # -- faults ---------------------------------------------------------------------------------------------------

    def _mend(self, call: Call, exc: BaseException) -> None:
        """A call has ended by an exception. In the thread of the mender."""
        try:
            if self._channel is not None:
                self._channel.drain(_DRAIN)
            events = self._judge(call, self.blame(exc))
        except Exception:  # noqa: BLE001 - what an author wrote may raise
            _log.exception("what has become of a call cannot be told")
            with self._lock:
                self._calls.pop(call.number, None)
                self._leave(call)
                tasks = list(call.tasks.values())
                call.tasks.clear()
            events = [Failed(task.id, JobCause.LOST, describe(exc)) for task in tasks]
        self._tell(events)
        self._forget(call)
        self._send()

    def _tell(self, events: list[Event]) -> None:
        """Emit what became of calls that failed."""
        if events:
            self._emit(events)
            if any(isinstance(event, Rerun) for event in events):
                with self._lock:
                    self._untold -= 1

    def _judge(self, call: Call, fault: Fault) -> list[Event]:
        """What becomes of the jobs of a call that failed."""
        with self._lock:
            if self._calls.pop(call.number, None) is None:
                return []
            self._leave(call)
            if self._stopping:
                return []
            if fault.reach is Reach.CALL:
                return self._sort_out([call], fault, self._alone)
            self._fallen.append((call, fault))
            if call.executor is not None and self._executor is call.executor:
                self._executor = None
                self._let_go(call.executor)
            return self._settle_fallen()

    def _settle_fallen(self) -> list[Event]:
        """With the lock: once all calls of a broken executor have ended, what becomes of the jobs in those that failed.

        Any of them may be to blame, so they run with nothing beside them.
        """
        broken = [call.executor for call, _ in self._fallen]
        if not broken or any(not call.left and call.executor in broken for call in self._calls.values()):
            return []
        fault = self._fallen[-1][1]
        calls = [call for call, _ in self._fallen]
        self._fallen = []
        return self._sort_out(calls, fault, self._suspects)

    def _sort_out(self, calls: list[Call], fault: Fault, suspects: deque[Task]) -> list[Event]:
        """With the lock: tell of the jobs whose fault it was; the others run again."""
        events, innocent, suspected = sort_out(calls, fault)
        self._waiting.extendleft(reversed(innocent))
        suspects.extend(suspected)
        # Whoever starts them again must not be quicker than the news that the last run does not count.
        self._untold += any(isinstance(event, Rerun) for event in events)
        return events


def _remove(queue: deque[Task], job_id: str) -> bool:
    for task in queue:
        if task.id == job_id:
            queue.remove(task)
            return True
    return False


def _name_of_thread() -> str:
    return threading.current_thread().name
