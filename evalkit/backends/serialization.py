"""How functions, arguments and outputs travel to another process, and what to say when they cannot.

By reference where the receiving side can import it, by value (cloudpickle) where it cannot: ``__main__``, notebooks,
lambdas, closures. Large contiguous buffers (numpy arrays) travel beside the pickle, without a copy.
"""

from __future__ import annotations

import functools
import inspect
import pickle
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import cloudpickle

from evalkit.errors import SerializationError

__all__ = ["OUT_OF_BAND_BYTES", "Packer", "dumps", "explain", "loads"]

#: Buffers of at least this many bytes travel beside the pickle instead of in it.
OUT_OF_BAND_BYTES = 65536

_PROTOCOL = 5
_MAX_DEPTH = 8


class Packer:
    """:func:`dumps` for many values of one name, without setting up for each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffers: list[memoryview] = []

    def pack(self, value: Any) -> tuple[bytes, list[memoryview]]:
        """As :func:`dumps`."""
        try:
            data = pickle.dumps(value, _PROTOCOL, buffer_callback=self._keep_in_band)
        except Exception:  # noqa: BLE001 - dumps has the last word
            data = b"__main__"
        buffers = self._buffers
        if buffers:
            self._buffers = []
        # A reference to __main__ means another module over there.
        return (data, buffers) if b"__main__" not in data else dumps(value, self._name, function=True)

    def _keep_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        self._buffers.append(raw)
        return False


def dumps(value: Any, name: str, *, function: bool = False, in_band: bool = False) -> tuple[bytes, list[memoryview]]:
    """Pickle ``value``.

    Args:
        name: what to call it in an error, such as ``args``.
        function: whether it is, or holds, a function; then cloudpickle comes first.
        in_band: whether large buffers are to be in the pickle like all else.

    Returns:
        the pickle, and the large buffers that go with it, in order.

    Raises:
        SerializationError: it does not pickle; names the attribute that is to blame.
    """
    buffers: list[memoryview] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if in_band or raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        buffers.append(raw)
        return False

    if not function:
        try:
            data = pickle.dumps(value, _PROTOCOL, buffer_callback=keep_in_band)
        except Exception:  # noqa: BLE001 - anything may come out of a user's __reduce__; cloudpickle has the last word
            buffers.clear()
        else:
            # A reference to __main__ means another module over there.
            if b"__main__" not in data:
                return data, buffers
            buffers.clear()
    try:
        return cloudpickle.dumps(value, _PROTOCOL, buffer_callback=keep_in_band), buffers
    except Exception as exc:
        raise explain(value, name, exc) from exc


def loads(data: bytes | bytearray, buffers: Iterable[Any] = ()) -> Any:
    """The inverse of :func:`dumps`."""
    return pickle.loads(data, buffers=buffers)


def explain(value: Any, name: str, exc: BaseException) -> SerializationError:
    """Find the attribute because of which ``value`` does not pickle, and say so."""
    path, culprit = _find(value, name, 0, set())
    kind = type(culprit).__qualname__
    return SerializationError(
        f"{path} ({kind}) cannot be pickled, so it cannot travel to or from a worker: {type(exc).__name__}: {exc}", path
    )


def _pickles(value: Any) -> bool:
    try:
        cloudpickle.dumps(value, _PROTOCOL)
    except Exception:  # noqa: BLE001 - that it raises is the answer
        return False
    return True


def _find(value: Any, path: str, depth: int, seen: set[int]) -> tuple[str, Any]:
    seen.add(id(value))
    if depth < _MAX_DEPTH:
        for step, child in _children(value):
            if id(child) not in seen and not _pickles(child):
                return _find(child, path + step, depth + 1, seen)
    return path, value


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value that its pickle would hold, with the way to each."""
    if isinstance(value, Mapping):
        for key, child in list(value.items()):
            yield f"[{key!r}]", child
    elif isinstance(value, list | tuple | set | frozenset):
        for index, child in enumerate(value):
            yield f"[{index}]", child
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield from ((f".args[{index}]", child) for index, child in enumerate(value.args))
        yield from ((f".keywords[{key!r}]", child) for key, child in value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        variables = inspect.getclosurevars(value)
        yield from ((f" -> {name}", child) for name, child in variables.nonlocals.items())
        yield from ((f" -> {name}", child) for name, child in variables.globals.items())
    if not isinstance(value, type | types.ModuleType | types.FunctionType):
        for name, child in list(getattr(value, "__dict__", {}).items()):
            yield f".{name}", child
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    yield f".{name}", getattr(value, name)
