"""What evalkit itself brings, through the same hooks as every plugin; and the plugins that it knows by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evalkit.hookspecs import BackendSpec, StorageSpec, hookimpl

__all__ = ["KNOWN_BACKENDS", "KNOWN_STORAGES", "evalkit_backends", "evalkit_storages"]

#: Plugins of this project: name -> the line that installs it.
KNOWN_BACKENDS: Mapping[str, str] = {
    "loky": "pip install evalkit-loky",
    "ray": "pip install evalkit-ray",
    "mpicomm": "pip install evalkit-mpi",
}
KNOWN_STORAGES: Mapping[str, str] = {"redis": "pip install evalkit-redis", "rediss": "pip install evalkit-redis"}


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
            install="pip install 'evalkit[postgresql]'",
            summary="a PostgreSQL server",
        ),
    ]
