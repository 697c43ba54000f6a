"""How functions, arguments and outputs travel to another process, and what to say when they cannot.

By reference where the receiving side can import it, by value (cloudpickle) where it cannot: ``__main__``, notebooks,
lambdas, closures. Where the way allows it, large contiguous buffers (numpy arrays) travel beside the pickle, without a
copy; elsewhere they are a part of it.
"""

from __future__ import annotations

import functools
import inspect
import io
import pickle
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import cloudpickle

from evalkit.errors import SerializationError
from evalkit.usercode import describe_error

__all__ = ["OUT_OF_BAND_BYTES", "Packer", "dumps", "explain", "loads", "pack_exception", "unpack_exception"]

#: Buffers of at least this many bytes travel beside the pickle instead of in it.
OUT_OF_BAND_BYTES = 65536

_PROTOCOL = 5
_MAX_DEPTH = 8
_MAX_BUFFERS = 1024  # beside one pickle

_BufferCallback = Callable[[pickle.PickleBuffer], bool]


class Packer:
    """Pickles many values of one name, large buffers apart; for one thread.

    Args:
        name: what to call a value in an error, such as ``args``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffers: list[memoryview] = []

    def pack(self, value: Any) -> tuple[bytes, list[memoryview]]:
        """Pickle a value.

        Returns:
            the pickle, and the large buffers that go with it, in order.

        Raises:
            SerializationError: it does not pickle; names the attribute that is to blame.
        """
        data = _by_reference(value, self._keeps_in_band)
        if data is None:
            return self.pack_by_value(value)
        return data, self._take_buffers()

    def pack_by_value(self, value: Any) -> tuple[bytes, list[memoryview]]:
        """Pickle a value with what cannot be imported in it; slower. As :meth:`pack` otherwise."""
        self._buffers = []
        data = _by_value(value, self._name, self._keeps_in_band)
        return data, self._take_buffers()

    def _keeps_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND_BYTES or len(self._buffers) == _MAX_BUFFERS:
            return True
        self._buffers.append(raw)
        return False

    def _take_buffers(self) -> list[memoryview]:
        buffers = self._buffers
        if buffers:
            self._buffers = []
        return buffers


def dumps(value: Any, name: str, *, function: bool = False) -> bytes:
    """Pickle one value, all of it in one piece, large buffers included.

    Args:
        name: what to call the value in an error.
        function: whether it is, or holds, a function: it is then pickled by value at once.

    Raises:
        SerializationError: it does not pickle; names the attribute that is to blame.
    """
    data = None if function else _by_reference(value, None)
    return _by_value(value, name, None) if data is None else data


def _by_reference(value: Any, buffer_callback: _BufferCallback | None) -> bytes | None:
    """Pickle a value of which everything can be imported; None if that is not so."""
    try:
        data = pickle.dumps(value, _PROTOCOL, buffer_callback=buffer_callback)
    except BaseException:  # noqa: BLE001 - a user's __reduce__ may raise anything; the other way has the last word
        return None
    # A reference to __main__ means another module over there.
    return None if b"__main__" in data else data


def _by_value(value: Any, name: str, buffer_callback: _BufferCallback | None) -> bytes:
    file = io.BytesIO()
    try:
        _ByValuePickler(file, _PROTOCOL, buffer_callback=buffer_callback).dump(value)
    except BaseException as exc:
        raise explain(value, name, exc) from exc
    return file.getvalue()


class _ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """cloudpickle, and what it cannot do by itself.

    It takes functions of ``__main__`` behind ``functools.cache`` for importable. And it rebuilds a class empty and then
    sets its attributes, which does not work for ``__class__``, as proxies have it: that has to be there from the start.
    """

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is _CACHED and obj.__module__ == "__main__":
            return _cached, (obj.__wrapped__, obj.cache_parameters())
        reduced = super().reducer_override(obj)
        if issubclass(type(obj), type) and "__class__" in _attributes_of(obj) and type(reduced) is tuple:
            match reduced:
                case (_, (_, _, _, dict(from_the_start), _, _), ({"__class__": descriptor} as attributes, _), *_):
                    from_the_start["__class__"] = descriptor
                    del attributes["__class__"]
        return reduced


_attributes_of = type.__dict__["__dict__"].__get__  # a metaclass may have another one of this name
_CACHED = type(functools.cache(lambda: None))


def _cached(function: Any, parameters: Mapping[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def loads(data: bytes | bytearray, buffers: Iterable[Any] = ()) -> Any:
    """The inverse of :func:`dumps`, and with its buffers of :meth:`Packer.pack`."""
    return pickle.loads(data, buffers=buffers)


def pack_exception(exc: BaseException) -> bytes:
    """An exception as it travels; a description of it if it holds something that does not."""
    try:
        return pickle.dumps(exc)
    except BaseException:  # noqa: BLE001 - it holds something that does not travel, or exits when it is pickled
        return pickle.dumps(RuntimeError(describe_error(exc)))


def unpack_exception(data: bytes) -> BaseException:
    """The inverse of :func:`pack_exception`; an exception that says so, if it cannot be rebuilt here."""
    try:
        exc: BaseException = pickle.loads(data)
    except BaseException as failure:  # noqa: BLE001 - it may want more arguments than it has, or exit when it is rebuilt
        return RuntimeError(f"what became of a call cannot be read: {describe_error(failure)}")
    return exc


def explain(value: Any, name: str, exc: BaseException) -> SerializationError:
    """Find the attribute because of which ``value`` does not pickle, and say so."""
    try:
        path, culprit = _find(value, name, 0, set())
    except BaseException:  # noqa: BLE001 - looking into a user's object may raise anything
        path, culprit = name, value
    try:
        said = str(exc)
    except BaseException:  # noqa: BLE001 - so may its message
        said = "<its message cannot be shown>"
    kind = type(culprit).__qualname__
    return SerializationError(
        f"{path} ({kind}) cannot be pickled, so it cannot travel to or from a worker: {type(exc).__name__}: {said}",
        path,
    )


def _pickles(value: Any) -> bool:
    try:
        cloudpickle.dumps(value, _PROTOCOL)
    except BaseException:  # noqa: BLE001 - that it raises is the answer
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
