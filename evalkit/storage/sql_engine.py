"""Connections and transactions of a SQL storage.

SQLAlchemy reads the URL and brings the driver, the dialect and the compiled statements; these are executed on the
driver's own connection, since a statement through SQLAlchemy costs five times the driver's (13 µs and 2 µs on SQLite),
and a search loop waits for about ten of them a job.

A process holds two connections to a database, each under a lock: one writes, one reads, so that a long read keeps no
writer waiting. A forked child never touches its parent's connections: it opens its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from evalkit.errors import PluginNotInstalledError, StorageFormatError, StorageUnavailableError
from evalkit.storage.sql_errors import is_locked, storage_error
from evalkit.storage.sql_schema import SCHEMA_VERSION, Statements, statements_for
from evalkit.storage.sql_url import SQLAddress

__all__ = ["Cursor", "Database"]

T = TypeVar("T")
#: A DB-API cursor of whichever driver.
Cursor = Any

#: The same number in every process: who holds this lock of PostgreSQL creates tables or searches.
_ADVISORY_LOCK = 0x6576616C6B6974
#: A query of the catalogue, since to_regclass() may answer from a cache while others create the table.
_POSTGRESQL_HAS_SCHEMA = """
    SELECT 1 FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relname = 'evalkit_schema' AND n.nspname = ANY (current_schemas(false))
"""
_FIRST_WAIT, _LONGEST_WAIT = 0.005, 0.1  # seconds between two tries to open a database that others are opening


class _Slot:
    """One connection of one process, and the lock of whoever uses it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connection: Any = None
        self.file: tuple[int, int] | None = None  # the device and inode of the file of SQLite that it has open


class _Connections:
    """The connections of one process."""

    def __init__(self) -> None:
        self.writer = _Slot()
        self.reader = _Slot()


class Database:
    """A database that holds the tables of evalkit; they are created in an empty one.

    Args:
        address: where it is.

    Raises:
        StorageUnavailableError: it cannot be opened.
        StorageFormatError: it is not a database, not one of evalkit, or of another version.
        PluginNotInstalledError: the driver is missing.
    """

    def __init__(self, address: SQLAddress) -> None:
        self._address = address
        self._timeout = address.timeout
        self._is_sqlite = address.path is not None
        self._file_name = None if address.path is None else os.fspath(address.path)
        try:
            engine = sa.create_engine(
                address.url, poolclass=NullPool, **({"paramstyle": "named"} if self._is_sqlite else {})
            )
        except ImportError as exc:  # psycopg is missing, or the library that it calls is
            raise PluginNotInstalledError(
                f"the storage 'postgresql' needs the driver psycopg ({exc}): pip install 'psycopg[binary]>=3.2'",
                "postgresql",
            ) from exc
        self._dialect: Any = engine.dialect
        self._error: type[Exception] = self._dialect.loaded_dbapi.Error
        self.sql: Statements = statements_for(self._dialect)
        # By process id: what a forked child finds of its parent is kept, untouched, for as long as the child lives,
        # since closing a copied connection would end the parent's session, or drop its locks.
        self._by_process: dict[int, _Connections] = {}
        self.read(lambda _: None)

    # -- transactions ---------------------------------------------------------------------------------------------

    def write(self, work: Callable[[Cursor], T]) -> T:
        """Run ``work(cursor)`` in a transaction: all of it is written, or nothing.

        It may run twice, if the connection turns out to have been lost before anything was written.

        Raises:
            StorageError: what the driver raised, mapped. What ``work`` raises itself passes as it is.
        """
        slot = self._connections().writer
        with slot.lock:
            try:
                return self._write(slot, work)
            except (self._error, OverflowError, UnicodeError) as exc:
                raise storage_error(exc, self._dialect.loaded_dbapi, self._address) from exc

    def _write(self, slot: _Slot, work: Callable[[Cursor], T]) -> T:
        again = slot.connection is not None
        committing = False
        try:
            connection = self._connected(slot)
            cursor = connection.cursor()
            if self._is_sqlite:
                cursor.execute("BEGIN IMMEDIATE")  # the driver's own would take the lock at the first write, too late
            result = work(cursor)
            if self._is_sqlite:
                self._check_file(slot)
            committing = True
            connection.commit()
        except self._error as exc:
            lost = slot.connection is not None and self._dialect.is_disconnect(exc, slot.connection, None)
            self._roll_back(slot, keep=is_locked(exc))
            if not (again and lost) or committing:
                raise
        except BaseException:
            self._roll_back(slot, keep=True)
            raise
        else:
            return result
        return self._write(slot, work)  # its connection is gone: this time it opens one

    def _check_file(self, slot: _Slot) -> None:
        """Raise if the file has gone: SQLite would go on to write to what nobody can ever open again."""
        if self._file() != slot.file:
            raise StorageUnavailableError(
                f"{self._address.path} was deleted, moved or replaced while it was in use, so nothing is written: put "
                "it back, or stop and start again with another file"
            )

    def _file(self) -> tuple[int, int] | None:
        if self._file_name is None:
            return None
        try:
            status = os.stat(self._file_name)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def read(self, work: Callable[[Cursor], T]) -> T:
        """Run ``work(cursor)``, each statement of which sees what was committed when it began.

        Raises:
            StorageError: what the driver raised, mapped. What ``work`` raises itself passes as it is.
        """
        slot = self._connections().reader
        with slot.lock:
            try:
                return self._read(slot, work)
            except (self._error, OverflowError, UnicodeError) as exc:
                raise storage_error(exc, self._dialect.loaded_dbapi, self._address) from exc

    def _read(self, slot: _Slot, work: Callable[[Cursor], T]) -> T:
        again = slot.connection is not None
        try:
            connection = self._connected(slot)
            if not self._is_sqlite:
                connection.autocommit = True
            return work(connection.cursor())
        except self._error as exc:
            lost = slot.connection is not None and self._dialect.is_disconnect(exc, slot.connection, None)
            if not is_locked(exc):
                self._close(slot)
            if not (again and lost):
                raise
        except Exception:
            raise  # of work itself: the connection is sound
        except BaseException:
            self._close(slot)  # interrupted in the middle of an answer, perhaps
            raise
        return self._read(slot, work)

    def lock_all(self, cursor: Cursor) -> None:
        """Wait until no other transaction creates searches or tables; SQLite has one writer at a time anyway."""
        if not self._is_sqlite:
            cursor.execute("SELECT pg_advisory_xact_lock(%s::bigint)", (_ADVISORY_LOCK,))

    def fetch_many(self, cursor: Cursor, statement: str, keys: list[int]) -> list[Any]:
        """Execute ``select_heads`` or ``select_jobs`` for many keys: in one round trip where there is a network."""
        if not self._is_sqlite:
            return list(cursor.execute(statement, {"keys": keys}).fetchall())
        rows = (cursor.execute(statement, {"job_key": key}).fetchone() for key in keys)
        return [row for row in rows if row is not None]

    def close(self) -> None:
        """Close the connections of this process; the next call opens new ones."""
        connections = self._connections()
        for slot in (connections.reader, connections.writer):  # the last one to leave SQLite folds the -wal file in
            with slot.lock:
                self._close(slot)

    # -- connections ----------------------------------------------------------------------------------------------

    def _connections(self) -> _Connections:
        process = os.getpid()
        connections = self._by_process.get(process)
        if connections is None:
            connections = self._by_process.setdefault(process, _Connections())
        return connections

    def _connected(self, slot: _Slot) -> Any:
        if slot.connection is None:
            deadline = time.monotonic() + self._timeout
            wait = _FIRST_WAIT
            while slot.connection is None:
                try:
                    slot.connection = self._connect()
                    slot.file = self._file()
                except self._error as exc:
                    # While another process makes the database or its write-ahead log, SQLite does not wait by itself.
                    if not is_locked(exc) or time.monotonic() >= deadline:
                        raise
                    time.sleep(wait)
                    wait = min(2 * wait, _LONGEST_WAIT)
        return slot.connection

    def _connect(self) -> Any:
        args, options = self._dialect.create_connect_args(self._address.url)
        if self._is_sqlite:
            options |= {"timeout": self._timeout, "isolation_level": None, "check_same_thread": False}
        else:
            options.setdefault("connect_timeout", max(2, round(self._timeout)))
            # A machine that has gone away says nothing: the kernel is to notice in about the same time.
            options.setdefault("tcp_user_timeout", max(1000, round(self._timeout * 1000)))
            options.setdefault("keepalives_idle", max(1, round(self._timeout / 2)))
            options.setdefault("keepalives_interval", max(1, round(self._timeout / 6)))
            options.setdefault("keepalives_count", 3)
        connection = self._dialect.connect(*args, **options)
        try:
            cursor = connection.cursor()
            if self._is_sqlite:
                cursor.execute("PRAGMA foreign_keys = ON")
                if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    self._check_empty_or_ours(cursor)
                    cursor.execute("PRAGMA journal_mode = WAL")
                cursor.execute("PRAGMA synchronous = NORMAL")
            else:
                connection.isolation_level = self._dialect.loaded_dbapi.IsolationLevel.READ_COMMITTED
                cursor.execute(f"SET lock_timeout = {round(self._timeout * 1000)}")
            self._prepare_schema(connection, cursor)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare_schema(self, connection: Any, cursor: Cursor) -> None:
        """Create the tables in an empty database; check the version of those that are there."""
        if not self._has_schema(cursor):
            if self._is_sqlite:
                cursor.execute("BEGIN IMMEDIATE")
            self.lock_all(cursor)
            if not self._has_schema(cursor):  # another process may just have made it
                self._check_empty_or_ours(cursor)
                for statement in self.sql.create_schema:
                    cursor.execute(statement)
                cursor.execute(self.sql.insert_schema, {"version": SCHEMA_VERSION})
        found = cursor.execute(self.sql.select_schema).fetchone()
        connection.commit()
        if found is not None and found[0] in self.sql.upgrade_schema:
            found = self._upgrade_schema(connection, cursor)
        if found is None or found[0] != SCHEMA_VERSION:
            raise StorageFormatError(
                f"{self._address.shown} has version {found and found[0]} of the tables of evalkit, and this evalkit "
                f"knows version {SCHEMA_VERSION}: open it with the evalkit that wrote it or a newer one, or use "
                "another database"
            )

    def _upgrade_schema(self, connection: Any, cursor: Cursor) -> Any:
        """Make the tables of an older evalkit ours; one process does it, all at once. Return the version."""
        if self._is_sqlite:
            cursor.execute("BEGIN IMMEDIATE")
        self.lock_all(cursor)
        found = cursor.execute(self.sql.select_schema).fetchone()
        while found is not None and found[0] in self.sql.upgrade_schema:
            for statement in self.sql.upgrade_schema[found[0]]:
                cursor.execute(statement)
            cursor.execute(self.sql.set_schema, {"new_version": found[0] + 1})
            found = cursor.execute(self.sql.select_schema).fetchone()
        connection.commit()
        return found

    def _has_schema(self, cursor: Cursor) -> bool:
        if self._is_sqlite:
            return "evalkit_schema" in self._sqlite_tables(cursor)
        return cursor.execute(_POSTGRESQL_HAS_SCHEMA).fetchone() is not None

    def _check_empty_or_ours(self, cursor: Cursor) -> None:
        """See that a file is not another program's; a database of a server is shared by many programs as a rule."""
        if self._is_sqlite:
            found = self._sqlite_tables(cursor)
            if found and "evalkit_schema" not in found:
                raise StorageFormatError(
                    f"{self._address.path} is the database of another program, with tables such as {found[0]!r}: "
                    "choose another file"
                )

    @staticmethod
    def _sqlite_tables(cursor: Cursor) -> list[str]:
        return [name for (name,) in cursor.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]

    def _roll_back(self, slot: _Slot, *, keep: bool) -> None:
        """End a transaction that failed; a connection that is not known to be sound is closed."""
        try:
            if keep and slot.connection is not None:
                slot.connection.rollback()
                return
        except self._error:
            pass
        self._close(slot)

    def _close(self, slot: _Slot) -> None:
        connection, slot.connection = slot.connection, None
        if connection is not None:
            with contextlib.suppress(self._error):
                connection.close()
