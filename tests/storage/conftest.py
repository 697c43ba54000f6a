"""A real PostgreSQL server for the tests, from a wheel; one for the whole run, on a socket in a temporary folder."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgresql_server(folder_for_servers: Path) -> Iterator[str]:
    """The URL of a server, as SQLAlchemy writes it."""
    for module in ("pgserver", "psycopg"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no PostgreSQL to test against: {module} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the wheel and of what it imports
        import pgserver

        server = pgserver.get_server(folder_for_servers / "postgresql", cleanup_mode="delete")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    server.cleanup()


@pytest.fixture
def new_database(postgresql_server: str) -> Callable[[], str]:
    """A function that creates an empty database and returns its URL."""
    import psycopg

    def create() -> str:
        name = f"test_{next(_numbers)}"
        with psycopg.connect(postgresql_server.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return postgresql_server.replace("/postgres?", f"/{name}?")

    return create


_numbers = itertools.count()
