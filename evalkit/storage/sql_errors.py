"""What the drivers of SQL raise, mapped once to the errors of evalkit."""

from __future__ import annotations

import os
from typing import Any

from evalkit.errors import StorageError, StorageFormatError, StorageUnavailableError
from evalkit.storage.sql_url import SQLAddress

__all__ = ["is_locked", "storage_error"]

_LOCK_NOT_AVAILABLE = "55P03"  # the SQLSTATE of PostgreSQL


def is_locked(exc: Exception) -> bool:
    """Whether it says that another one holds a lock: the connection is sound, and trying again may work."""
    name = getattr(exc, "sqlite_errorname", None) or ""
    return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or getattr(exc, "sqlstate", None) == _LOCK_NOT_AVAILABLE


def storage_error(exc: Exception, driver: Any, address: SQLAddress) -> StorageError:
    """The error to raise for one of a driver.

    Args:
        exc: what the driver raised.
        driver: its DB-API module, with the classes of its errors.
        address: the database.
    """
    said = address.without_secrets(str(exc)).strip()
    where = address.shown
    if is_locked(exc):
        return StorageUnavailableError(
            f"{where} was locked by others for {address.timeout:g} s ({said}): try again later"
        )
    name = getattr(exc, "sqlite_errorname", None) or ""
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return StorageFormatError(f"{address.path} is not a sound SQLite database ({said}): choose another file")
    if name.startswith("SQLITE_CANTOPEN"):
        return StorageUnavailableError(f"{address.path} cannot be opened: {_obstacle(address)}")
    if name.startswith("SQLITE_FULL"):
        return StorageUnavailableError(
            f"no space left for {address.path} ({said}): nothing was written, try again later"
        )
    if name.startswith("SQLITE_READONLY"):
        return StorageUnavailableError(f"{address.path} is not writable ({said}): check its permissions")
    if name == "SQLITE_TOOBIG":
        return StorageError(f"a value is larger than {where} can hold ({said}): store a file and its path instead")
    away = (driver.OperationalError, driver.InterfaceError, driver.InternalError)
    if isinstance(exc, away) and name != "SQLITE_ERROR":
        return StorageUnavailableError(f"{where} is away or cannot be used now ({said}): try again later")
    return StorageError(f"{where} refused a statement ({type(exc).__name__}: {said})")


def _obstacle(address: SQLAddress) -> str:
    path = address.path
    if path is None or path.is_dir():
        return "it is a folder: name a file in it"
    folder = path.parent
    if not folder.exists():
        return f"the folder {folder} does not exist: create it first"
    if not folder.is_dir():
        return f"{folder} is not a folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the folder {folder} is not writable, and SQLite makes files beside the database: choose another"
    return f"check the permissions of it and of the folder {folder}"
