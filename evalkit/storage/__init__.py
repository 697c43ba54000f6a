"""Where the records of searches live: the contract, and the storages that come with evalkit.

``SQLStorage`` is imported on first use, so that nothing of an engine is loaded before it is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evalkit.storage.base import JobRecord, JobUpdate, SearchRecord, Storage, StorageSpec
from evalkit.storage.memory import MemoryStorage
from evalkit.storage.null import NullStorage

if TYPE_CHECKING:
    from evalkit.storage.left_values import OpaqueValue as OpaqueValue
    from evalkit.storage.left_values import UnstorableValue as UnstorableValue
    from evalkit.storage.sql import SQLStorage as SQLStorage

__all__ = [
    "JobRecord",
    "JobUpdate",
    "MemoryStorage",
    "NullStorage",
    "OpaqueValue",
    "SQLStorage",
    "SearchRecord",
    "Storage",
    "StorageSpec",
    "UnstorableValue",
]


def __getattr__(name: str) -> Any:
    if name == "SQLStorage":
        from evalkit.storage.sql import SQLStorage

        return SQLStorage
    if name in ("OpaqueValue", "UnstorableValue"):
        from evalkit.storage import left_values

        return getattr(left_values, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
