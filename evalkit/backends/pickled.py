"""Values that come from workers as pickles: opened here where that runs no code of anybody, else by the evaluator.

Unpickling an object runs code of its class: it may raise, exit, take minutes or never return. A backend reads messages
while it holds a lock, so it only opens pickles of plain values, and tells of the others as they are.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Sequence
from typing import Any

from evalkit.backends.events import Done, DonePickled, Measured, Pickled, Recorded, RecordedPickled, WorkerIdentity

__all__ = ["done", "recorded"]

_MAX_BYTES = 2**20  # of a pickle that is opened here; a larger one takes longer than a switch to another thread

#: What the pickles of arrays call: it makes an array of bytes and does nothing else.
_HARMLESS = frozenset(
    (f"numpy{module}", name)
    for module in ("", ".core.multiarray", ".core.numeric", "._core.multiarray", "._core.numeric")
    for name in ("_frombuffer", "_reconstruct", "dtype", "ndarray", "scalar")
)


def done(
    job_id: str, data: bytes | memoryview, buffers: Sequence[Any], measured: Measured, worker: WorkerIdentity | None
) -> Done | DonePickled:
    """The event of a run that returned what is pickled in ``data`` and ``buffers``."""
    try:
        return Done(job_id, _open_plain(data, buffers), measured, worker)
    except Exception:  # noqa: BLE001 - whatever is wrong with it is found again, and told, by who opens it
        return DonePickled(job_id, Pickled(data, buffers), measured, worker)


def recorded(job_id: str, data: bytes | memoryview, buffers: Sequence[Any] = ()) -> Recorded | RecordedPickled:
    """The event of values that a run recorded, pickled in ``data`` and ``buffers``."""
    try:
        return Recorded(job_id, _open_plain(data, buffers))
    except Exception:  # noqa: BLE001 - as above
        return RecordedPickled(job_id, Pickled(data, buffers))


def _open_plain(data: bytes | memoryview, buffers: Sequence[Any]) -> Any:
    """Unpickle a value of builtins and arrays.

    Raises:
        Exception: it is something else.
    """
    if len(data) > _MAX_BYTES:
        raise _NotPlainError
    return _PlainUnpickler(io.BytesIO(data), buffers=buffers).load()


class _NotPlainError(Exception):
    pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS and module in sys.modules:
            return super().find_class(module, name)
        raise _NotPlainError
