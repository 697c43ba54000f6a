"""Values as JSON text, with their types.

What JSON holds is plain JSON, written at the cost of ``json.dumps``. What it would change in silence (a tuple, an int
key, a numpy float) or cannot hold is written as a tagged object, ``{"__evalkit__": [kind, payload]}``; a user's dict
with that very key is tagged itself, so it survives. An object of any other type is kept as a pickle in base64. Opening
a pickle runs code, so :func:`decode` does it only with ``allow_pickle=True`` and hands out an :class:`OpaqueValue`
otherwise. An object that does not even pickle leaves an :class:`UnstorableValue`, which says what it was.

Nothing that is given to :func:`encode` makes it raise, except running out of memory.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import fractions
import json
import pathlib
import pickle
import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle

from evalkit.errors import StorageFormatError

__all__ = ["OpaqueValue", "UnstorableValue", "decode", "encode"]

_TAG = "__evalkit__"
#: Containers nested deeper are pickled: JSON is read and written recursively, and a structure may even hold itself.
_MAX_DEPTH = 100
#: Python refuses to print longer ints in decimal (sys.set_int_max_str_digits is never below 640 digits).
_MAX_DECIMAL_BITS = 2000
#: How much of the repr of an object that cannot be stored is kept, in characters.
_MAX_REPR = 10_000

_SCALARS = frozenset({str, int, float, bool, type(None)})
_KEYS = frozenset({str})
_CONTAINERS = frozenset({dict, list})

_dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


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
    """What is left of an object that does not pickle, such as a lock.

    Attributes:
        type_name: the qualified name of its type.
        text: its ``repr``, the first 10,000 characters of it.
    """

    type_name: str
    text: str


def encode(value: Any) -> str:
    """Write a value as ASCII JSON text, from which :func:`decode` makes an equal value of the same types.

    numpy is not imported: a numpy value can only come from a program that has.
    """
    try:
        if _is_plain(value, _MAX_DEPTH):
            text = _dumps(value)
            if (
                "\\ud" not in text
            ):  # a surrogate: half of a pair, which is fine, or alone, which JSON would join to the next
                return text
    except (ValueError, RecursionError):
        pass  # an int of more digits than Python prints, or a caller that is deep in the stack
    return _dumps(_jsonable(value, _MAX_DEPTH))


def _is_plain(value: Any, depth: int) -> bool:
    """Whether JSON holds it exactly; the types of a whole container are looked at in C."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is dict:
        if not _KEYS.issuperset(map(type, value)) or _TAG in value:
            return False
        value = value.values()
    elif kind is not list:
        return False
    nested = set(map(type, value)) - _SCALARS
    if not nested:
        return True
    if depth == 0 or not nested <= _CONTAINERS:
        return False
    return all(_is_plain(one, depth - 1) for one in value if type(one) not in _SCALARS)


# -- writing ----------------------------------------------------------------------------------------------------------


def _tagged(kind: str, payload: Any) -> dict[str, Any]:
    return {_TAG: [kind, payload]}


def _base64(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def _jsonable(value: Any, depth: int) -> Any:
    """Make the JSON structure of any value."""
    kind = type(value)
    if kind in _SCALARS:
        if kind is str and not value.isascii() and not _encodable(value):
            return _tagged("str", _base64(value.encode("utf-8", "surrogatepass")))
        if kind is int and value.bit_length() > _MAX_DECIMAL_BITS:
            return _tagged("int", hex(value))
        return value
    if isinstance(value, enum.Enum):
        return _tagged("enum", [kind.__module__, kind.__qualname__, value.name, _pickled(value)[_TAG]])
    writer = _LEAVES.get(kind)
    if writer is not None:
        return writer(value)
    if kind.__module__ == "numpy":
        return _numpy(value)
    if depth == 0:
        return _pickled(value)
    if kind is list:
        return [_jsonable(one, depth - 1) for one in value]
    if kind in _SEQUENCES:
        return _tagged(kind.__name__, [_jsonable(one, depth - 1) for one in value])
    if kind is dict and _TAG not in value and all(type(key) is str and _encodable(key) for key in value):
        return {key: _jsonable(one, depth - 1) for key, one in value.items()}
    if kind is dict or kind is OrderedDict:
        items = [[_jsonable(key, depth - 1), _jsonable(one, depth - 1)] for key, one in value.items()]
        return _tagged(kind.__name__, items)
    return _pickled(value)


def _encodable(text: str) -> bool:
    """Whether it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _datetime(value: datetime.datetime | datetime.time) -> dict[str, Any]:
    # ISO text holds an offset, not a named zone, nor which side of a clock change it is.
    zone = value.tzinfo
    if zone is None or (type(zone) is datetime.timezone and _is_unnamed(zone)):
        text = value.isoformat()
        return _tagged(type(value).__name__, [text, value.fold] if value.fold else text)
    return _pickled(value)


def _is_unnamed(zone: datetime.timezone) -> bool:
    return repr(zone) == repr(datetime.timezone(zone.utcoffset(None)))


def _numpy(value: Any) -> dict[str, Any]:
    numpy = sys.modules["numpy"]
    if type(value) is numpy.str_:
        return _tagged("numpy.str", _jsonable(str(value), 0))
    if type(value) is numpy.bytes_:
        return _tagged("numpy.bytes", _base64(bytes(value)))
    if type(value) is numpy.ndarray or isinstance(value, numpy.generic):
        dtype = value.dtype
        if dtype.kind in "biufcmM" or (dtype.kind in "US" and dtype.itemsize):
            shape = list(value.shape) if type(value) is numpy.ndarray else None
            return _tagged("numpy", [dtype.str, shape, _base64(value.tobytes())])
    return _pickled(value)


def _pickled(value: Any) -> dict[str, Any]:
    kind = type(value)
    type_name = f"{kind.__module__}.{kind.__qualname__}"
    data = None
    try:
        data = pickle.dumps(value, protocol=5)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001, S110 - __reduce__ is the user's code; cloudpickle is tried next
        pass
    if data is None or b"__main__" in data:  # by name, what is in __main__ is found by this process only
        try:
            data = cloudpickle.dumps(value, protocol=5)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001
            if data is None:
                return _tagged("unstorable", [type_name, _jsonable(_repr(value), 0)])
    return _tagged("pickle", [type_name, _base64(data)])


def _repr(value: Any) -> str:
    try:
        return repr(value)[:_MAX_REPR]
    except Exception as exc:  # noqa: BLE001 - __repr__ is the user's code, and recursion may run out
        return f"<an object whose repr raises {type(exc).__name__}>"


_SEQUENCES = frozenset({tuple, set, frozenset})

_LEAVES: dict[type, Callable[[Any], dict[str, Any]]] = {
    bytes: lambda value: _tagged("bytes", _base64(value)),
    bytearray: lambda value: _tagged("bytearray", _base64(value)),
    complex: lambda value: _tagged("complex", [value.real, value.imag]),
    datetime.datetime: _datetime,
    datetime.time: _datetime,
    datetime.date: lambda value: _tagged("date", value.isoformat()),
    datetime.timedelta: lambda value: _tagged("timedelta", [value.days, value.seconds, value.microseconds]),
    decimal.Decimal: lambda value: _tagged("Decimal", str(value)),
    fractions.Fraction: lambda value: _tagged(
        "Fraction", [_jsonable(value.numerator, 0), _jsonable(value.denominator, 0)]
    ),
    uuid.UUID: lambda value: _tagged("UUID", str(value)),
    OpaqueValue: lambda value: _tagged("pickle", [value.type_name, _base64(value.data)]),
    UnstorableValue: lambda value: _tagged("unstorable", [value.type_name, _jsonable(value.text, 0)]),
    pathlib.PurePosixPath: lambda value: _tagged("PurePosixPath", _jsonable(str(value), 0)),
    pathlib.PureWindowsPath: lambda value: _tagged("PureWindowsPath", _jsonable(str(value), 0)),
    pathlib.PosixPath: lambda value: _tagged("Path", _jsonable(str(value), 0)),
    pathlib.WindowsPath: lambda value: _tagged("Path", _jsonable(str(value), 0)),
}


# -- reading ----------------------------------------------------------------------------------------------------------


def decode(text: str, *, allow_pickle: bool = False) -> Any:
    """Read what :func:`encode` wrote.

    Args:
        text: the JSON text.
        allow_pickle: unpickle what was pickled; do it only for what you, or one you trust, have written. A pickle that
            does not open here (its module is not installed, …) is handed out as an :class:`OpaqueValue` nevertheless.

    Raises:
        StorageFormatError: it is not what ``encode`` of this or an older evalkit wrote.
    """
    try:
        if _TAG not in text:
            return json.loads(text)
        return json.loads(text, object_hook=_open if allow_pickle else _show)
    except (StorageFormatError, MemoryError):
        raise
    except Exception as exc:  # each kind is read in its own way, and each fails in its own
        raise StorageFormatError(f"a stored value does not read ({exc}): {text[:80]!r}") from exc


def _show(found: dict[str, Any]) -> Any:
    tagged = found.get(_TAG)
    if tagged is None:
        return found
    kind, payload = tagged
    reader = _READERS.get(kind)
    if reader is None:
        raise StorageFormatError(
            f"a stored value is of the kind {kind!r}, unknown to this evalkit: upgrade evalkit to read it"
        )
    return reader(payload)


def _open(found: dict[str, Any]) -> Any:
    value = _show(found)
    if type(value) is not OpaqueValue:
        return value
    try:
        return value.open()
    except Exception:  # noqa: BLE001 - the user's code; the value is not lost, and its open() says what is wrong
        return value


def _enum(payload: list[Any]) -> Any:
    """Find the member where its class is loaded already; import nothing, since importing runs code."""
    module, qualname, name, (kind, pickled) = payload
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = None if found is None else vars(found).get(part)
    if isinstance(found, type) and issubclass(found, enum.Enum) and name in found.__members__:
        return found[name]
    return _READERS[kind](pickled)


def _folded(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda payload: read(payload) if type(payload) is str else read(payload[0]).replace(fold=payload[1])


def _numpy_of(payload: list[Any]) -> Any:
    import numpy

    dtype, shape, data = payload
    raw = base64.b64decode(data)
    if shape is None:
        return numpy.frombuffer(raw, dtype)[0]
    flat = numpy.frombuffer(raw, dtype) if raw else numpy.empty(0, dtype)
    return flat.reshape(shape).copy()


def _numpy_text(kind: str) -> Callable[[Any], Any]:
    def read(payload: str) -> Any:
        import numpy

        return numpy.str_(payload) if kind == "str" else numpy.bytes_(base64.b64decode(payload))

    return read


_READERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "str": lambda payload: base64.b64decode(payload).decode("utf-8", "surrogatepass"),
    "int": lambda payload: int(payload, 16),
    "bytes": base64.b64decode,
    "bytearray": lambda payload: bytearray(base64.b64decode(payload)),
    "complex": lambda payload: complex(*payload),
    "datetime": _folded(datetime.datetime.fromisoformat),
    "time": _folded(datetime.time.fromisoformat),
    "date": datetime.date.fromisoformat,
    "timedelta": lambda payload: datetime.timedelta(*payload),
    "Decimal": decimal.Decimal,
    "Fraction": lambda payload: fractions.Fraction(*payload),
    "UUID": uuid.UUID,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
    "Path": pathlib.Path,
    "enum": _enum,
    "numpy": _numpy_of,
    "numpy.str": _numpy_text("str"),
    "numpy.bytes": _numpy_text("bytes"),
    "pickle": lambda payload: OpaqueValue(payload[0], base64.b64decode(payload[1])),
    "unstorable": lambda payload: UnstorableValue(*payload),
}
