"""One search in memory: a table of columns.

One list or array a field, indexed by the job's number, since a search may have millions of jobs: appending a batch is
one C-level call a column, and an object a job would cost several times the time and the memory.
"""

from __future__ import annotations

import logging
import time
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from evalkit.errors import FinalStateError, StorageError, VersionConflictError
from evalkit.interrupts import InterruptHeld
from evalkit.job import TERMINAL_STATES, ErrorInfo, Job, JobCause, JobState
from evalkit.storage.base import JobRecord, JobUpdate
from evalkit.storage.naming import job_not_found, split_job_id

__all__ = ["Table"]

_log = logging.getLogger("evalkit")

#: The states by code: QUEUED is 0 so that a bytearray finds the next one with memchr; the terminal ones come last.
_STATES = (JobState.QUEUED, *(state for state in JobState if state not in {*TERMINAL_STATES, JobState.QUEUED}))
_QUEUED, _RUNNING, _FIRST_TERMINAL = 0, _STATES.index(JobState.RUNNING), len(_STATES)
_STATES = (*_STATES, *(state for state in JobState if state in TERMINAL_STATES))


def _code_of(state: JobState) -> int:
    for code, one in enumerate(_STATES):
        if one is state:  # an Enum hashes and compares in Python code: identity is several times faster
            return code
    return _code_of(JobState(state))


_ONE, _ZERO, _NEVER = array("l", [1]), array("l", [0]), array("q", [0])
_MAX_LOG_SIZE = 64 * 2**20  # characters of logs that a search keeps in memory


class _Ending:
    """What few jobs have: kept beside the columns."""

    __slots__ = ("cause", "error", "records")

    def __init__(self) -> None:
        self.error: ErrorInfo | None = None
        self.cause: JobCause | None = None
        self.records: Sequence[Mapping[str, Any]] = ()


class Table:
    """One search. Whoever calls it holds the lock of the storage."""

    def __init__(self, search_id: str) -> None:
        self.id = search_id
        self.created = time.time()
        self.values: dict[str, Any] = {}
        # The columns.
        self._ids: list[str] = []
        self._args: list[Mapping[str, Any]] = []
        self._codes = bytearray()
        self._versions = array("l")
        self._attempts = array("l")
        self._outputs: list[Any] = []
        self._metadata: list[Mapping[str, Any] | None] = []
        self._owners: list[str | None] = []
        self._workers: list[str | None] = []
        self._birth = array("d")
        self._endings: dict[int, _Ending] = {}
        self._unwritten: list[Job] = []  # have ended, and go into the columns before anybody looks at those
        self._logs: dict[int, str] = {}  # the newest ones, oldest first
        self._log_size = 0
        self._counts = [0] * len(_STATES)
        # Each write is a line of the log (its change number, the job); only the last line of a job counts.
        self._last_change = array("q")
        self._log_changes = array("q")
        self._log_numbers = array("q")
        self._change = 0
        # QUEUED jobs are those from _fresh on, and those put back, which wait in a heap; both are checked when taken.
        self._fresh = 0
        self._requeued: list[int] = []
        self._empty_at_first: tuple[tuple[Any, Any], ...] = (
            (self._codes, b"\0"),
            (self._versions, _ONE),  # an array; a list would be taken one by one
            (self._attempts, _ZERO),
            (self._outputs, [None]),
            (self._metadata, [None]),
            (self._workers, [None]),
        )
        self._leases: dict[int, float] = {}
        self._expiries: list[tuple[float, int]] = []

    # -- writing --------------------------------------------------------------------------------------------------

    def create(self, args_list: Sequence[Mapping[str, Any]], owner: str | None) -> list[str]:
        first, n = len(self._ids), len(args_list)
        prefix = self.id + "."
        ids = [prefix + str(number) for number in range(first, first + n)]
        self._ids += ids
        self._args += args_list
        self._owners += [owner] * n
        self._birth += array("d", [time.time()]) * n
        self._counts[_QUEUED] += n
        self._last_change += _NEVER * n
        self._log(range(first, first + n))
        return ids

    def _fill(self) -> None:
        """Extend the columns in which new jobs have nothing, and which wait for somebody to look.

        It can be interrupted anywhere, in the middle of what a user reads: the next one goes on.
        """
        n = len(self._ids)
        for column, nothing in self._empty_at_first:
            column.extend(nothing * (n - len(column)))

    def end_later(self, jobs: Sequence[Job]) -> None:
        """Write the ends of these jobs before the table is next looked at."""
        self._unwritten += jobs
        # Jobs that print hold logs, of which only so many are kept. One that does is seldom the only one.
        if jobs[-1].printed is not None:
            self._catch_up()

    def _catch_up(self) -> None:
        self._fill()
        if self._unwritten:
            with InterruptHeld():  # it is a user who reads
                ended, self._unwritten = self._unwritten, []
                self._write_ends([JobUpdate.of(job) for job in ended])

    def _write_ends(self, updates: Sequence[JobUpdate]) -> None:
        try:
            self.write(updates, *self.check(updates))
        except StorageError:
            for update in updates:
                try:
                    self.write([update], *self.check([update]))
                except StorageError as exc:
                    _log.error("job %s cannot be recorded: %s", update.id, exc)

    def check(self, updates: Sequence[JobUpdate]) -> tuple[list[int], list[int | None]]:
        """Find the rows of a batch, which has not been written yet, and see that all of it can be.

        Returns:
            the number of each job, and the code of its new state; None where it stays.
        """
        self._catch_up()
        ids, codes, versions = self._ids, self._codes, self._versions
        skip = len(self.id) + 1
        numbers: list[int] = []
        new_codes: list[int | None] = []
        state: JobState | None = None
        code: int | None = None
        conflict: VersionConflictError | None = None
        for update in updates:
            job_id = update.id
            try:
                number = int(job_id[skip:])
                found = ids[number] == job_id
            except (ValueError, IndexError):
                found = False
            if not found:
                raise job_not_found(job_id)
            if codes[number] >= _FIRST_TERMINAL:
                raise _final(job_id, _STATES[codes[number]])
            if update.if_version is not None and versions[number] != update.if_version and conflict is None:
                conflict = VersionConflictError(job_id, update.if_version, versions[number])
            numbers.append(number)
            if update.state is not state:  # it is the same one over most of a batch
                state = update.state
                code = None if state is None else _code_of(state)
            new_codes.append(code)
        if len(set(numbers)) != len(numbers):
            self._check_repeated(updates, numbers)
        elif conflict is not None:
            raise conflict
        return numbers, new_codes

    def _check_repeated(self, updates: Sequence[JobUpdate], numbers: list[int]) -> None:
        """Check a batch with several writes to one job: each sees what those before it have written."""
        now: dict[int, tuple[int, JobState | None]] = {}
        for update, number in zip(updates, numbers, strict=True):
            version, state = now.get(number, (self._versions[number], None))
            if state in TERMINAL_STATES:
                raise _final(update.id, state)
            if update.if_version is not None and version != update.if_version:
                raise VersionConflictError(update.id, update.if_version, version)
            now[number] = version + 1, update.state or state

    def write(self, updates: Sequence[JobUpdate], numbers: list[int], codes_of: Sequence[int | None]) -> None:
        """Write a batch that was checked. It cannot fail: every value was looked at before."""
        codes, versions, counts = self._codes, self._versions, self._counts
        outputs, metadata, leases = self._outputs, self._metadata, self._leases
        for update, number, code in zip(updates, numbers, codes_of, strict=True):
            versions[number] += 1
            if code is not None:
                counts[codes[number]] -= 1
                counts[code] += 1
                codes[number] = code
                if code >= _FIRST_TERMINAL:
                    outputs[number] = update.output
                    if leases:
                        leases.pop(number, None)
                elif code == _QUEUED:
                    self._put_back(number)
                elif number in leases:
                    heappush(self._expiries, (leases[number], number))
            if update.metadata is not None:
                metadata[number] = update.metadata
            if update.worker is not None and codes[number] != _QUEUED:  # a queued job is held by nobody
                self._workers[number] = update.worker
            if update.attempt is not None:
                self._attempts[number] = update.attempt
            if update.log is not None:
                self._keep_log(number, update.log)
            if update.error is not None or update.cause is not None or update.records is not None:
                ending = self._endings.setdefault(number, _Ending())
                if update.error is not None:
                    ending.error = update.error
                if update.cause is not None:
                    ending.cause = update.cause
                if update.records is not None:
                    ending.records = update.records
        self._log(numbers)

    def _keep_log(self, number: int, log: str) -> None:
        self._log_size += len(log) - len(self._logs.pop(number, ""))
        self._logs[number] = log
        while self._log_size > _MAX_LOG_SIZE and len(self._logs) > 1:
            self._log_size -= len(self._logs.pop(next(iter(self._logs))))

    def _put_back(self, number: int) -> None:
        """Make a job that has just become QUEUED again be held by nobody and found by the next claim."""
        self._workers[number] = None
        self._leases.pop(number, None)
        if number < self._fresh:
            heappush(self._requeued, number)

    def _log(self, numbers: Sequence[int]) -> None:
        last_change = self._last_change
        changes = array("q", range(self._change + 1, self._change + 1 + len(numbers)))
        self._log_changes += changes
        self._log_numbers.extend(numbers)
        if isinstance(numbers, range):
            last_change[numbers.start : numbers.stop] = changes
        else:
            for number, change in zip(numbers, changes, strict=True):
                last_change[number] = change
        self._change += len(numbers)
        if len(self._log_numbers) > 3 * len(self._ids) + 1024:
            # At least twice as many lines were written as there are jobs since the last time: constant cost a write.
            lines = [
                (one, number)
                for one, number in zip(self._log_changes, self._log_numbers, strict=True)
                if last_change[number] == one
            ]
            self._log_changes = array("q", [one for one, _ in lines])
            self._log_numbers = array("q", [number for _, number in lines])

    # -- reading --------------------------------------------------------------------------------------------------

    def record(self, number: int) -> JobRecord:
        ending = self._endings.get(number)
        return JobRecord(
            id=self._ids[number],
            search_id=self.id,
            args=dict(self._args[number]),
            state=_STATES[self._codes[number]],
            version=self._versions[number],
            attempt=self._attempts[number],
            output=self._outputs[number],
            error=None if ending is None else ending.error,
            cause=None if ending is None else ending.cause,
            records=[] if ending is None else [dict(one) for one in ending.records],
            metadata=dict(self._metadata[number] or ()),
            owner=self._owners[number],
            worker=self._workers[number],
            lease_expires=self._leases.get(number),
            created=self._birth[number],
        )

    def log(self, job_id: str) -> str:
        self._catch_up()
        return self._logs.get(self._number(job_id), "")

    def select(self, ids: Iterable[str] | None, states: Collection[JobState] | None) -> list[JobRecord]:
        self._catch_up()
        codes = None if states is None else {_code_of(state) for state in states}
        if ids is not None:
            numbers = sorted({self._number(job_id) for job_id in ids})
            if codes is not None:
                numbers = [number for number in numbers if self._codes[number] in codes]
        elif codes is None:
            numbers = list(range(len(self._ids)))
        else:
            numbers = sorted(number for code in codes for number in self._numbers_in(code))
        return [self.record(number) for number in numbers]

    def _number(self, job_id: str) -> int:
        search_id, number = split_job_id(job_id)
        if search_id != self.id or number >= len(self._ids):
            raise job_not_found(job_id)
        return number

    def _numbers_in(self, code: int) -> Iterable[int]:
        number = -1
        for _ in range(self._counts[code]):
            number = self._codes.index(code, number + 1)
            yield number

    def count(self) -> dict[JobState, int]:
        self._catch_up()
        return {state: count for state, count in zip(_STATES, self._counts, strict=True) if count}

    def changes(self, cursor: int) -> tuple[list[JobRecord], int]:
        self._catch_up()
        start = bisect_right(self._log_changes, cursor)
        lines = zip(self._log_changes[start:], self._log_numbers[start:], strict=True)
        last_change = self._last_change
        return [self.record(number) for change, number in lines if last_change[number] == change], self._change

    # -- the queue ------------------------------------------------------------------------------------------------

    def claim(self, n: int, worker: str, expires: float) -> list[JobRecord]:
        self._catch_up()
        codes, requeued = self._codes, self._requeued
        claimed: list[int] = []
        while len(claimed) < n:
            while requeued and codes[requeued[0]] != _QUEUED:
                heappop(requeued)
            if requeued:  # all of them are below the fresh ones
                number = heappop(requeued)
            else:
                number = codes.find(_QUEUED, self._fresh)
                self._fresh = len(codes) if number < 0 else number + 1
                if number < 0:
                    break
            self._counts[_QUEUED] -= 1
            self._counts[_RUNNING] += 1
            codes[number] = _RUNNING
            self._workers[number] = worker
            self._versions[number] += 1
            self._lease(number, expires)
            claimed.append(number)
        self._log(claimed)
        return [self.record(number) for number in claimed]

    def renew(self, job_id: str, worker: str, expires: float) -> bool:
        self._catch_up()
        try:
            number = self._number(job_id)
        except LookupError:
            return False
        if self._workers[number] != worker or not _QUEUED < self._codes[number] < _FIRST_TERMINAL:
            return False
        self._lease(number, expires)
        return True

    def _lease(self, number: int, expires: float) -> None:
        self._leases[number] = expires
        heappush(self._expiries, (expires, number))
        if len(self._expiries) > 2 * len(self._leases) + 64:
            self._expiries = [(one, leased) for leased, one in self._leases.items()]
            heapify(self._expiries)

    def release(self, now: float) -> list[str]:
        self._catch_up()
        released: list[int] = []
        while self._expiries and self._expiries[0][0] <= now:
            expires, number = heappop(self._expiries)
            if self._leases.get(number) != expires or self._codes[number] != _RUNNING:
                continue  # renewed, ended or put back since
            self._counts[_RUNNING] -= 1
            self._counts[_QUEUED] += 1
            self._codes[number] = _QUEUED
            self._versions[number] += 1
            self._attempts[number] += 1
            self._put_back(number)
            released.append(number)
        released.sort()
        self._log(released)
        return [self._ids[number] for number in released]


def _final(job_id: str, state: JobState | None) -> FinalStateError:
    return FinalStateError(f"job {job_id} has ended ({state}), and what has ended never changes")
