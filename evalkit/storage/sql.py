"""SQLStorage: searches in SQLite or PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Self

from evalkit.errors import FinalStateError, SerializationError, StorageError, VersionConflictError
from evalkit.job import JobState
from evalkit.storage.base import JobRecord, JobUpdate, SearchRecord, Storage
from evalkit.storage.codec import decode, encode
from evalkit.storage.naming import (
    check_claim,
    check_search_id,
    job_not_found,
    search_exists,
    search_not_found,
    split_job_id,
)
from evalkit.storage.plain import MAX_TEXT
from evalkit.storage.sql_engine import Cursor, Database
from evalkit.storage.sql_rows import NO_COUNTS, STATES, TERMINAL, LockedSearch, content_of, record_of
from evalkit.storage.sql_schema import MAX_PER_SEARCH, STATE_PARAMETERS, first_key
from evalkit.storage.sql_url import SQLAddress

__all__ = ["SQLStorage"]

_QUEUED, _RUNNING = JobState.QUEUED.value, JobState.RUNNING.value
_LARGEST_DECIMAL = 2**62


class SQLStorage(Storage):
    """Searches in a database that processes, and with PostgreSQL machines, share.

    SQLite keeps a write-ahead log beside the file (``-wal``, ``-shm``), which needs a local file system: on a network
    file system, use PostgreSQL or another storage. A call that has returned survives a kill of the process; the last
    moments before a power failure may be lost, the database itself is not.

    Args:
        url: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` or
            ``postgresql+psycopg://user:password@host/database``.
        allow_pickle: unpickle what was stored as a pickle; do it only for databases whose writers you trust.
        timeout: how long to wait for a lock that others hold, and for a server to answer, in seconds; None takes what
            the URL says (``?timeout=5``), or 30.

    Raises:
        StorageURLError, StorageUnavailableError, StorageFormatError: as :meth:`from_url`.
        PluginNotInstalledError: the driver of PostgreSQL is missing.
    """

    def __init__(self, url: str, *, allow_pickle: bool = False, timeout: float | None = None) -> None:
        self._address = SQLAddress.parse(url, timeout)
        self._allow_pickle = allow_pickle
        self._database = Database(self._address)
        self._sql = self._database.sql

    @classmethod
    def from_url(cls, url: str) -> Self:
        return cls(url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the URL. Raises ``SerializationError`` if that holds credentials, which would travel with it."""
        if self._address.secrets:
            raise SerializationError(
                f"the storage {self.url} does not pickle since its URL holds a password: open it by URL in the other "
                "process, or keep the password in a ~/.pgpass file",
                "storage",
            )
        return _reopen, (type(self), self.url, self._allow_pickle, self._address.timeout)

    @property
    def url(self) -> str:
        return self._address.shown

    def close(self) -> None:
        """Close the connections of this process and fold SQLite's log into the file. The next call opens them again."""
        self._database.close()

    def _records(self, search_id: str, rows: Iterable[Any]) -> list[JobRecord]:
        return [record_of(search_id, row, allow_pickle=self._allow_pickle) for row in rows]

    def _decode(self, text: str | None) -> Any:
        return None if text is None else decode(text, allow_pickle=self._allow_pickle)

    # -- searches -------------------------------------------------------------------------------------------------

    def create_search(self, search_id: str | None = None) -> str:
        if search_id is not None:
            check_search_id(search_id)

        def work(cursor: Cursor) -> str:
            self._database.lock_all(cursor)
            name = self._free_search_id(cursor) if search_id is None else search_id
            if cursor.execute(self._sql.select_search, {"search_id": name}).fetchone() is not None:
                raise search_exists(name, self.url)
            row = dict.fromkeys(("next_number", "last_change", *(name.removeprefix("add_") for name in NO_COUNTS)), 0)
            number = int(name) if name.isascii() and name.isdecimal() and str(int(name[:20])) == name else None
            if number is not None and number > _LARGEST_DECIMAL:
                number = None
            cursor.execute(self._sql.insert_search, {**row, "id": name, "decimal": number, "created": time.time()})
            return name

        return self._database.write(work)

    def _free_search_id(self, cursor: Cursor) -> str:
        if cursor.execute(self._sql.select_search, {"search_id": "0"}).fetchone() is None:
            return "0"
        return str(cursor.execute(self._sql.free_decimal).fetchone()[0])

    def list_searches(self) -> list[str]:
        return self._database.read(
            lambda cursor: [row[0] for row in cursor.execute(self._sql.list_searches).fetchall()]
        )

    def load_search(self, search_id: str) -> SearchRecord:
        def work(cursor: Cursor) -> tuple[float, list[tuple[str, str]]]:
            key, created = self._find(cursor, search_id)
            return created, cursor.execute(self._sql.select_values, {"search_key": key}).fetchall()

        created, values = self._database.read(work)
        return SearchRecord(search_id, created, {decode(name): self._decode(value) for name, value in values})

    def delete_search(self, search_id: str) -> None:
        def work(cursor: Cursor) -> None:
            search = self._lock(cursor, search_id)
            cursor.execute(self._sql.delete_search, {"search_key": search.key})

        self._database.write(work)

    def set_value(self, search_id: str, key: str, value: Any) -> None:
        name, text = encode(key), encode(value)

        def work(cursor: Cursor) -> None:
            where = {"search_key": self._lock(cursor, search_id).key, "value_name": name}
            cursor.execute(self._sql.delete_value, where)
            cursor.execute(self._sql.insert_value, {**where, "new_value": text})

        self._database.write(work)

    def get_value(self, search_id: str, key: str, default: Any = None) -> Any:
        def work(cursor: Cursor) -> tuple[str] | None:
            where = {"search_key": self._find(cursor, search_id)[0], "value_name": encode(key)}
            row: tuple[str] | None = cursor.execute(self._sql.select_value, where).fetchone()
            return row

        row = self._database.read(work)
        return default if row is None else self._decode(row[0])

    def _find(self, cursor: Cursor, search_id: str) -> tuple[int, float]:
        """Read the key of a search, and when it was created."""
        row = cursor.execute(self._sql.select_search, {"search_id": search_id}).fetchone()
        if row is None:
            known = [name for (name,) in cursor.execute(self._sql.list_searches).fetchall()]
            raise search_not_found(search_id, known, self.url)
        key, created = row
        return key, created

    def _lock(self, cursor: Cursor, search_id: str) -> LockedSearch:
        """Read the row of a search, and keep all other writers of the search out until the transaction ends."""
        row = cursor.execute(self._sql.lock_search, {"search_id": search_id}).fetchone()
        if row is None:
            self._find(cursor, search_id)  # raises
        return LockedSearch(search_id, *row)

    def _advance(self, cursor: Cursor, search: LockedSearch, created: int = 0) -> None:
        """Write the counters of a search that :meth:`_lock` has locked."""
        if search.next_number + created > MAX_PER_SEARCH or search.change + search.added >= MAX_PER_SEARCH:
            raise StorageError(
                f"search {search.id!r} has had {MAX_PER_SEARCH:,} writes, the most it can: create another"
            )
        cursor.execute(
            self._sql.advance,
            {"search_key": search.key, "add_number": created, "add_change": search.added, **search.counts},
        )

    # -- jobs -----------------------------------------------------------------------------------------------------

    def create_jobs(
        self, search_id: str, args_list: Sequence[Mapping[str, Any]], *, owner: str | None = None
    ) -> list[str]:
        texts = [encode(args if type(args) is dict else dict(args)) for args in args_list]

        def work(cursor: Cursor) -> int:
            search = self._lock(cursor, search_id)
            if texts:
                now = time.time()
                rows = [
                    {
                        "job_key": search.first + number,
                        "new_change": search.next_change(),
                        "search_key": search.key,
                        "created": now,
                        "owner": owner,
                        "args": text,
                    }
                    for number, text in enumerate(texts, search.next_number)
                ]
                _execute(cursor, self._sql.insert_job, rows)
                search.count(_QUEUED, len(texts))
                self._advance(cursor, search, created=len(texts))
            return search.next_number

        first = self._database.write(work)
        return [f"{search_id}.{number}" for number in range(first, first + len(texts))]

    def update_jobs(self, updates: Sequence[JobUpdate]) -> None:
        if not updates:
            return
        batches: dict[str, list[tuple[int, JobUpdate, dict[str, Any]]]] = {}
        size = 0
        for update in updates:
            search_id, number = _split(update.id)
            content = content_of(update)
            size += len(content["new_output"] or "") + len(content["new_records"] or "")
            if size > MAX_TEXT and len(updates) > 1:
                raise StorageError(f"one call takes {MAX_TEXT:,} characters of outputs and records: write fewer jobs")
            batches.setdefault(search_id, []).append((number, update, content))

        def work(cursor: Cursor) -> None:
            for search_id in sorted(batches):  # in one order for all writers, so that no two wait for each other
                self._update(cursor, search_id, batches[search_id])

        self._database.write(work)

    def _update(self, cursor: Cursor, search_id: str, batch: list[tuple[int, JobUpdate, dict[str, Any]]]) -> None:
        try:
            search = self._lock(cursor, search_id)
        except LookupError as exc:
            raise job_not_found(batch[0][1].id) from exc
        keys = [search.first + number for number, _, _ in batch]
        heads = self._database.fetch_many(cursor, self._sql.select_heads, keys)
        current = {key: (state, version) for key, state, version, _ in heads}
        steps: list[tuple[str, dict[str, Any]]] = []
        for key, (_, update, content) in zip(keys, batch, strict=True):
            if key not in current:
                raise job_not_found(update.id)
            state, version = current[key]
            if state in TERMINAL:
                raise FinalStateError(f"job {update.id} has ended ({state}), and what has ended never changes")
            if update.if_version is not None and update.if_version != version:
                raise VersionConflictError(update.id, update.if_version, version)
            new = state if update.state is None else update.state.value
            if new != state:
                search.moved(state, new)
            current[key] = new, version + 1
            statement = self._sql.update_job
            if new in TERMINAL:
                statement = self._sql.end_job
            elif new == _QUEUED:
                statement = self._sql.requeue_job
            steps.append((statement, {**content, "job_key": key, "new_state": new, "new_change": search.next_change()}))
        self._write_logs(cursor, keys, batch)
        for statement, group in groupby(steps, key=lambda step: step[0]):
            _execute(cursor, statement, [row for _, row in group])
        self._advance(cursor, search)

    def _write_logs(self, cursor: Cursor, keys: list[int], batch: list[tuple[int, JobUpdate, dict[str, Any]]]) -> None:
        for key, (_, update, _) in zip(keys, batch, strict=True):
            if update.log is not None:
                cursor.execute(self._sql.delete_log, {"job_key": key})
                cursor.execute(self._sql.insert_log, {"job_key": key, "new_text": encode(update.log)})

    def load_log(self, job_id: str) -> str:
        search_id, number = _split(job_id)

        def work(cursor: Cursor) -> str | None:
            try:
                key = first_key(self._find(cursor, search_id)[0]) + number
            except LookupError as exc:
                raise job_not_found(job_id) from exc
            row = cursor.execute(self._sql.select_log, {"job_key": key}).fetchone()
            if row is None:
                raise job_not_found(job_id)
            text: str | None = row[1]
            return text

        return self._decode(self._database.read(work)) or ""

    def load_jobs(
        self,
        search_id: str,
        ids: Iterable[str] | None = None,
        states: Collection[JobState] | None = None,
    ) -> list[JobRecord]:
        wanted = None if ids is None else list(ids)
        names = list(STATES) if states is None else [JobState(state).value for state in states]

        def work(cursor: Cursor) -> list[Any]:
            key = self._find(cursor, search_id)[0]
            if wanted is not None:
                rows = self._load_ids(cursor, search_id, key, wanted)
                return rows if states is None else [row for row in rows if row[3] in names]
            if states is None:
                return list(cursor.execute(self._sql.select_all, _range(key)).fetchall())
            if not names:
                return []
            padded = [*names, *([names[0]] * len(STATE_PARAMETERS))]
            where = dict(zip(STATE_PARAMETERS, padded, strict=False))
            return list(cursor.execute(self._sql.select_by_states, {"search_key": key, **where}).fetchall())

        return self._records(search_id, self._database.read(work))

    def _load_ids(self, cursor: Cursor, search_id: str, key: int, ids: list[str]) -> list[Any]:
        wanted = {}
        for job_id in ids:
            of_search, number = _split(job_id)
            if of_search != search_id:
                raise job_not_found(job_id)
            wanted[first_key(key) + number] = job_id
        rows = self._database.fetch_many(cursor, self._sql.select_jobs, sorted(wanted))
        if len(rows) < len(wanted):
            found = {row[0] for row in rows}
            raise job_not_found(next(job_id for one, job_id in wanted.items() if one not in found))
        return rows

    def count_jobs(self, search_id: str) -> dict[JobState, int]:
        def work(cursor: Cursor) -> Any:
            self._find(cursor, search_id)
            return cursor.execute(self._sql.count, {"search_id": search_id}).fetchone()

        return {state: n for state, n in zip(JobState, self._database.read(work) or (), strict=False) if n}

    def changes(self, search_id: str, cursor: int = 0) -> tuple[list[JobRecord], int]:
        def work(database: Cursor) -> tuple[int, list[Any]]:
            key = self._find(database, search_id)[0]
            where = _range(key)
            where["first"] += cursor
            return key, list(database.execute(self._sql.select_changes, where).fetchall())

        key, rows = self._database.read(work)
        return self._records(search_id, rows), rows[-1][1] - first_key(key) if rows else cursor

    # -- the queue that pull workers draw from --------------------------------------------------------------------

    def claim_jobs(self, search_id: str, n: int, worker: str, lease: float) -> list[JobRecord]:
        check_claim(n)

        def work(cursor: Cursor) -> list[Any]:
            search = self._lock(cursor, search_id)
            rows = cursor.execute(self._sql.select_queued, {"search_key": search.key, "n": n}).fetchall()
            if rows:
                expires = time.time() + lease
                steps = [
                    {
                        "job_key": row[0],
                        "new_state": _RUNNING,
                        "new_change": search.next_change(),
                        "new_worker": worker,
                        "new_lease": expires,
                    }
                    for row in rows
                ]
                _execute(cursor, self._sql.claim_job, steps)
                search.moved(_QUEUED, _RUNNING, len(rows))
                self._advance(cursor, search)
                return list(self._database.fetch_many(cursor, self._sql.select_jobs, [row[0] for row in rows]))
            return []

        return self._records(search_id, self._database.write(work))

    def renew_leases(self, ids: Sequence[str], worker: str, lease: float) -> list[str]:
        numbers: dict[str, dict[int, str]] = {}
        for job_id in ids:
            try:
                search_id, number = _split(job_id)
            except LookupError:
                continue  # a job that never was is held by nobody
            numbers.setdefault(search_id, {})[number] = job_id

        def work(cursor: Cursor) -> set[str]:
            held: set[str] = set()
            for search_id in sorted(numbers):
                row = cursor.execute(self._sql.lock_search, {"search_id": search_id}).fetchone()
                if row is None:
                    continue
                of_key = {first_key(row[0]) + number: job_id for number, job_id in numbers[search_id].items()}
                for key, state, _, holder in self._database.fetch_many(cursor, self._sql.select_heads, list(of_key)):
                    if holder == worker and state != _QUEUED and state not in TERMINAL:
                        cursor.execute(self._sql.lease_job, {"job_key": key, "new_lease": time.time() + lease})
                        held.add(of_key[key])
            return held

        held = self._database.write(work) if numbers else set()
        return [job_id for job_id in ids if job_id in held]

    def release_expired(self, search_id: str, now: float | None = None) -> list[str]:
        def work(cursor: Cursor) -> list[str]:
            search = self._lock(cursor, search_id)
            where = {"search_key": search.key, "now": time.time() if now is None else now}
            rows = cursor.execute(self._sql.select_expired, where).fetchall()
            if rows:
                steps = [{"job_key": row[0], "new_change": search.next_change()} for row in rows]
                _execute(cursor, self._sql.release_job, steps)
                search.moved(_RUNNING, _QUEUED, len(rows))
                self._advance(cursor, search)
            return [f"{search_id}.{row[0] - search.first}" for row in rows]

        return self._database.write(work)


def _reopen(kind: type[SQLStorage], url: str, allow_pickle: bool, timeout: float) -> SQLStorage:
    return kind(url, allow_pickle=allow_pickle, timeout=timeout)


def _split(job_id: str) -> tuple[str, int]:
    search_id, number = split_job_id(job_id)
    if number >= MAX_PER_SEARCH:
        raise job_not_found(job_id)
    return search_id, number


def _range(search_key: int) -> dict[str, int]:
    return {"first": first_key(search_key), "end": first_key(search_key + 1)}


def _execute(cursor: Cursor, statement: str, rows: list[dict[str, Any]]) -> None:
    if len(rows) == 1:
        cursor.execute(statement, rows[0])
    else:
        cursor.executemany(statement, rows)
