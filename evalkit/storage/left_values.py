"""OpaqueValue and UnstorableValue: what a storage hands out for an object that it did not open, or could not keep."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

__all__ = ["OpaqueValue", "UnstorableValue"]


@dataclass(frozen=True, slots=True)
class OpaqueValue:
    """A stored pickle that was not opened. Storing it again keeps it as it is.

    Attributes:
        type_name: the qualified name of the type that was pickled.
        data: the pickle.
    """

    type_name: str
    data: bytes

    def __repr__(self) -> str:
        return (
            f"<OpaqueValue: a pickle of {self.type_name}, {len(self.data):,} bytes; open() it if you trust its writer>"
        )

    def open(self) -> Any:
        """Unpickle it, which runs code of whoever wrote it.

        Raises:
            Exception: whatever unpickling raises, such as ``ModuleNotFoundError`` for a module that is missing here.
        """
        return pickle.loads(self.data)


@dataclass(frozen=True, slots=True)
class UnstorableValue:
    """What is left of an object that cannot be stored, such as a lock, or 10 GB.

    Attributes:
        type_name: the qualified name of its type.
        text: its ``repr``, the first 10,000 characters of it.
        error: why it cannot be stored, such as ``"TypeError: cannot pickle '_thread.lock' object"``.
    """

    type_name: str
    text: str
    error: str = ""
