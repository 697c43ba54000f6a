"""Rows of a SQL storage: a job as the database holds it, and the counters of a search during a transaction."""

from __future__ import annotations

from typing import Any

from evalkit.job import TERMINAL_STATES, ErrorInfo, JobCause, JobState
from evalkit.storage.base import JobRecord, JobUpdate
from evalkit.storage.codec import decode, encode
from evalkit.storage.sql_schema import MAX_PER_SEARCH, first_key

__all__ = ["NO_COUNTS", "STATES", "TERMINAL", "LockedSearch", "content_of", "record_of"]

# The database holds states by name. They are looked up as plain strings: an Enum hashes and compares in Python code.
STATES = {state.value: state for state in JobState}
TERMINAL = frozenset(state.value for state in TERMINAL_STATES)
_COUNTERS = {state.value: f"add_n_{state.value.lower()}" for state in JobState}
#: The parameters that add to the counters of a search, adding nothing.
NO_COUNTS = dict.fromkeys(_COUNTERS.values(), 0)


class LockedSearch:
    """The row of a search that this transaction has locked, and what it adds to its counters."""

    __slots__ = ("added", "change", "counts", "first", "id", "key", "next_number")

    def __init__(self, search_id: str, key: int, next_number: int, last_change: int) -> None:
        self.id = search_id
        self.key = key
        self.first = first_key(key)
        self.next_number = next_number
        self.change = last_change
        self.added = 0
        self.counts = dict(NO_COUNTS)

    def next_change(self) -> int:
        """Give out the next change number, as a key."""
        self.added += 1
        return self.first + self.change + self.added

    def count(self, state: str, n: int) -> None:
        """Note that ``n`` jobs more are in a state."""
        self.counts[_COUNTERS[state]] += n

    def moved(self, old: str, new: str, n: int = 1) -> None:
        """Note that ``n`` jobs went from one state to another."""
        self.count(old, -n)
        self.count(new, n)


def content_of(update: JobUpdate) -> dict[str, Any]:
    """The parameters that an update gives to a statement; None leaves what is stored."""
    error, cause, state = update.error, update.cause, update.state
    return {
        "new_attempt": update.attempt,
        "new_output": None if state is None or state.value not in TERMINAL else encode(update.output),
        "new_error": None if error is None else encode({name: getattr(error, name) for name in ErrorInfo.__slots__}),
        "new_cause": None if cause is None else cause.value,
        "new_records": None if update.records is None else encode([dict(one) for one in update.records]),
        "new_metadata": None if update.metadata is None else encode(dict(update.metadata)),
        "new_worker": update.worker,
    }


def record_of(search_id: str, row: Any, *, allow_pickle: bool) -> JobRecord:
    """Make the record of a row of the table of jobs, with its columns in their order."""

    def read(text: str | None) -> Any:
        return None if text is None else decode(text, allow_pickle=allow_pickle)

    key, _, _, state, version, attempt, created, lease, owner, worker, cause, args, output, error, metadata, records = (
        row
    )
    return JobRecord(
        id=f"{search_id}.{key % MAX_PER_SEARCH}",
        search_id=search_id,
        args=read(args),
        state=STATES[state],
        version=version,
        attempt=attempt,
        output=read(output),
        error=None if error is None else ErrorInfo(**read(error)),
        cause=None if cause is None else JobCause(cause),
        records=read(records) or [],
        metadata=read(metadata) or {},
        owner=owner,
        worker=worker,
        lease_expires=lease,
        created=created,
    )
