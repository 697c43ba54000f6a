"""What evalkit itself brings, through the same hooks as every plugin; and the plugins that it knows by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evalkit.hookspecs import BackendSpec, StorageSpec, hookimpl

__all__ = ["KNOWN_BACKENDS", "evalkit_backends", "evalkit_storages"]

#: Plugins of this project, which are in its repository: name -> what to type where.
KNOWN_BACKENDS: Mapping[str, str] = {
    "loky": "in a clone of evalkit: pip install ./plugins/evalkit-loky",
    "ray": "in a clone of evalkit: pip install ./plugins/evalkit-ray",
    "mpicomm": "in a clone of evalkit: pip install ./plugins/evalkit-mpi",
}


@hookimpl
def evalkit_backends() -> Sequence[BackendSpec]:
    return [
        BackendSpec("serial", "evalkit.backends.serial:SerialBackend", summary="in this thread, or on an asyncio loop"),
        BackendSpec("thread", "evalkit.backends.thread:ThreadBackend", summary="threads of this process"),
        BackendSpec("process", "evalkit.backends.process.pool:ProcessBackend", summary="supervised worker processes"),
    ]


@hookimpl
def evalkit_storages() -> Sequence[StorageSpec]:
    return [
        StorageSpec("memory", "evalkit.storage.memory:MemoryStorage", summary="in this process"),
        StorageSpec("null", "evalkit.storage.null:NullStorage", summary="keeps nothing"),
        StorageSpec("sqlite", "evalkit.storage.sql:SQLStorage", summary="a SQLite file"),
        StorageSpec(
            "postgresql",
            "evalkit.storage.sql:SQLStorage",
            install="pip install 'psycopg[binary]>=3.2'",
            summary="a PostgreSQL server",
        ),
    ]
