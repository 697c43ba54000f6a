"""The address of a SQL storage: what of its URL is used, and what is shown."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from evalkit.errors import StorageURLError

__all__ = ["DEFAULT_TIMEOUT", "SQLAddress"]

#: How long to wait for a lock or a server, in seconds.
DEFAULT_TIMEOUT = 30.0

_SECRET_OPTIONS = frozenset({"password", "passfile", "sslpassword", "sslkey"})
_HIDDEN = "***"
_HELP = "write sqlite:///relative.db, sqlite:////absolute.db or postgresql+psycopg://user@host/database"


@dataclass(frozen=True, slots=True, repr=False)
class SQLAddress:
    """Where a database is.

    Attributes:
        url: what to connect to; may hold credentials.
        shown: the same without them, for messages.
        path: the file of SQLite, absolute, so that a later ``chdir`` does not lead elsewhere; None for a server.
        secrets: the credentials in the URL.
        timeout: how long to wait for a lock or a server, in seconds.
    """

    url: URL
    shown: str
    path: Path | None
    secrets: tuple[str, ...]
    timeout: float

    @classmethod
    def parse(cls, url: str, timeout: float | None = None) -> SQLAddress:
        """Read a URL; a ``timeout`` in its query counts unless one is given.

        Raises:
            StorageURLError: it is not one of SQLite or PostgreSQL, or lacks something. Nothing of it that may be a
                credential is in the message.
        """
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):
            scheme = url.partition("://")[0] if "://" in url else "no scheme"
            raise StorageURLError(f"not a URL of a SQL storage ({scheme}): {_HELP}") from None  # it may hold a password
        query = dict(parsed.query)
        given = query.pop("timeout", None)
        if timeout is None:
            timeout = DEFAULT_TIMEOUT if given is None else _seconds(given)
        parsed = parsed.set(query=query)
        backend, _, driver = parsed.drivername.partition("+")
        if backend == "sqlite" and driver in {"", "pysqlite"}:
            return cls._of_file(parsed, timeout)
        if backend == "postgresql" and driver in {"", "psycopg"}:
            return cls._of_server(parsed.set(drivername="postgresql+psycopg"), timeout)
        raise StorageURLError(
            f"the SQL storage knows SQLite and PostgreSQL (by psycopg), not {parsed.drivername!r}: {_HELP}"
        )

    @classmethod
    def _of_file(cls, url: URL, timeout: float) -> SQLAddress:
        if url.host or url.username or url.port:
            raise StorageURLError(f"{url.render_as_string()!r} names a host, and SQLite is a file: {_HELP}")
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise StorageURLError(
                f"{url.render_as_string()!r} names no file: {_HELP}; records in memory are 'memory://'"
            )
        if url.query:
            raise StorageURLError(
                f"unknown options in {url.render_as_string()!r}: the one for SQLite is ?timeout=SECONDS"
            )
        path = Path(os.path.abspath(url.database))
        url = URL.create("sqlite", database=str(path))
        return cls(url, url.render_as_string(), path, (), timeout)

    @classmethod
    def _of_server(cls, url: URL, timeout: float) -> SQLAddress:
        secret = {name: value for name, value in url.query.items() if name in _SECRET_OPTIONS}
        values = [value for value in secret.values() if isinstance(value, str)]
        if url.password:
            values.append(str(url.password))
        elif url.password is not None:  # an empty one, as in "user:@host", which would be shown as a hidden one
            url = URL.create(url.drivername, url.username, None, url.host, url.port, url.database, url.query)
        shown = url.update_query_dict(dict.fromkeys(secret, _HIDDEN)).render_as_string(hide_password=True)
        return cls(url, shown, None, tuple(values), timeout)

    def without_secrets(self, message: str) -> str:
        """Hide the credentials in a message of a driver."""
        for secret in self.secrets:
            message = message.replace(secret, _HIDDEN)
        return message


def _seconds(text: object) -> float:
    try:
        seconds = float(str(text))
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < 1e6:
        raise StorageURLError(f"the timeout in the URL is a number of seconds, not {text!r}")
    return seconds
