"""The message that tells a worker what to run: the run function and ``worker_init``, with all that they hold.

It is made once, when the pool starts, so that a worker which starts later gets the same.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from evalkit.backends.base import RunFunction
from evalkit.backends.importing import importing_function
from evalkit.backends.process.wire import Kind, frame
from evalkit.backends.serialization import Packer, loads

__all__ = ["Setup", "load_setup", "pack_setup"]


class Setup(NamedTuple):
    """What a worker is told.

    Attributes:
        run_function, worker_init: see :class:`evalkit.backends.process.pool.ProcessBackend`.
        timed: whether the worker says when each job starts, and when it has returned.
    """

    run_function: RunFunction
    worker_init: Callable[[], Any] | None
    timed: bool


def pack_setup(setup: Setup) -> list[bytes | memoryview]:
    """Return the parts of the message. Large arrays in it are copied once, for all workers.

    Raises:
        SerializationError: one of the two does not pickle; names the attribute that is to blame.
    """
    function, arrays = Packer("run_function").pack_by_value(setup.run_function)
    init, arrays_of_init = Packer("worker_init").pack_by_value(setup.worker_init)
    # Copied, since the program may change an array before the last worker has started.
    buffers = [memoryview(bytes(array)) for array in (*arrays, *arrays_of_init)]
    payload = pickle.dumps((sys.path, sys.argv, function, len(arrays), init, setup.timed), 5)
    return frame(Kind.SETUP, payload, buffers)


def load_setup(payload: bytes, buffers: Sequence[memoryview]) -> Setup:
    """In a worker: import from where the program does, and rebuild what the message holds.

    Raises:
        BaseException: whatever the modules and objects of the user raise.
    """
    sys.path[:], sys.argv[:], function, num_arrays, init, timed = pickle.loads(payload)
    with importing_function():
        return Setup(loads(function, buffers[:num_arrays]), loads(init, buffers[num_arrays:]), timed)
