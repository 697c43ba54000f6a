"""Writer: writes a value that is not plain as JSON text, part by part.

A part that cannot be written, whatever its methods raise, leaves an :class:`UnstorableValue` in its place, and the
others stay as they are. No part is copied before it is known to fit: a job may return more than a database takes, and
more than could be copied in memory.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import fractions
import json.encoder
import pathlib
import pickle
import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import cloudpickle

from evalkit.interrupts import InterruptSeen
from evalkit.storage.left_values import OpaqueValue, UnstorableValue
from evalkit.storage.plain import MAX_DEPTH, MAX_TEXT, TAG, dumps, plain_text
from evalkit.usercode import describe_error, shown, text_of, type_name

__all__ = ["HasObjectsError", "Objects", "Writer"]

#: Python refuses to print longer ints in decimal (sys.set_int_max_str_digits is never below 640 digits).
_MAX_DECIMAL_BITS = 2000
#: Characters after which a container of containers that is met again is pickled, which writes it once: a few that hold
#: each other twice, and so on, have more parts than can be counted.
_MUCH = 5_000_000
_AT_A_TIME = 3 << 18  # bytes or characters, in whole groups of base64
_ELEMENTS_AT_A_TIME = 10_000
_PLAIN_AT_A_TIME = 4_000_000  # characters
_MAX_TEXT_LEFT = 10_000  # characters of the repr of what cannot be stored

# By the ids of types, since a metaclass may have a __hash__ and an __eq__ of its own.
_SCALARS = frozenset(map(id, (str, int, float, bool, type(None))))
_NESTING = frozenset(map(id, (dict, list, tuple, set, frozenset, OrderedDict)))
_escaped = json.encoder.encode_basestring_ascii


class _TooLarge(Exception):  # noqa: N818 - of a part, which is then replaced
    def __init__(self) -> None:
        super().__init__(f"too large: a stored value has at most {MAX_TEXT:,} characters, in base64 if it is binary")


class _Sink:
    """A file for a pickler; raises :class:`_TooLarge` in place of taking more bytes than fit."""

    def __init__(self, room: int) -> None:
        self.chunks: list[bytes] = []
        self._room = room

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._room -= size
        if self._room < 0:
            raise _TooLarge
        self.chunks.append(bytes(data))
        return size


class Objects(enum.Enum):
    """What is done with a part that is of a class of the user's, whose methods may do anything, and take for ever."""

    WRITE = enum.auto()
    #: Say so, by :class:`HasObjectsError`.
    REFUSE = enum.auto()
    #: Write an :class:`UnstorableValue` in its place, and call none of its methods.
    LEAVE_OUT = enum.auto()


class HasObjectsError(Exception):
    """A value has a part that is of a class of the user's."""


class Writer:
    """Writes one value that is not plain.

    Args:
        objects: what is done with them.
        why: they are left out.
    """

    def __init__(self, objects: Objects, why: str = "") -> None:
        self._objects = objects
        self._why = why
        self._left = MAX_TEXT  # characters that fit
        self._work = 2 * MAX_TEXT  # the same, with those that were dropped again, with the part that did not fit
        self._parts: list[str] = []
        self._around: set[int] = set()  # the ids of the containers that the present part is in
        self._met: dict[int, Any] = {}  # containers by their ids, which are theirs as long as they are here
        self._interrupts = InterruptSeen()

    def text(self, value: Any) -> str:
        """Return the text of the value.

        Raises:
            HasObjectsError: it has some, and they are refused.
        """
        with self._interrupts:
            try:
                self._write(value, MAX_DEPTH)
            except BaseException as exc:
                if self._interrupts.raised(exc) or type(exc) is HasObjectsError:
                    raise
                return dumps({TAG: ["unstorable", ["object", "", type_name(type(exc))]]})  # no stack is left
        return "".join(self._parts)

    def _put(self, text: str) -> None:
        self._left -= len(text)
        self._work -= len(text)
        if self._left < 0:
            raise _TooLarge
        self._parts.append(text)

    def _reserve(self, size: int) -> None:
        """Raise :class:`_TooLarge` if so many characters more do not fit."""
        if size > self._left or self._work < 0:
            raise _TooLarge

    def _write(self, value: Any, depth: int) -> None:
        """Write a part, or what can be said of it."""
        mark, left = len(self._parts), self._left
        try:
            self._reserve(0)
            self._write_any(value, depth)
        except BaseException as exc:
            if self._interrupts.raised(exc) or type(exc) is HasObjectsError:
                raise
            # If even this does not fit, it is the container that does not.
            del self._parts[mark:]
            self._left = left
            is_large = type(exc) is _TooLarge
            text = shown(value, 100 if is_large else _MAX_TEXT_LEFT)
            self._unstorable(type_name(type(value)), text, str(exc) if is_large else describe_error(exc))

    def _write_any(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind is str:
            self._str(value)
        elif id(kind) in _SCALARS:
            self._scalar(value)
        elif id(kind) in _NESTING:
            if depth == 0 or id(value) in self._around or self._is_met_often(value):
                self._object(value, depth)
            else:
                self._container(value, kind, depth)
        elif issubclass(kind, enum.Enum):
            self._enum(value)
        elif id(kind) in _LEAVES:
            self._reserve(sys.getsizeof(value) - 200)  # the text of a large one is longer than itself
            _LEAVES[id(kind)](self, value)
        elif type(kind) is type and kind.__module__ == "numpy":
            self._numpy(value, depth)
        else:
            self._object(value, depth)

    # -- containers -----------------------------------------------------------------------------------------------

    def _is_met_often(self, value: Any) -> bool:
        again = id(value) in self._met
        self._met[id(value)] = value
        if not again or self._work > 2 * MAX_TEXT - _MUCH:
            return False
        return any(id(type(one)) in _NESTING for one in (value.values() if isinstance(value, dict) else value))

    def _container(self, value: Any, kind: Any, depth: int) -> None:
        """Write the parts of a container, or of one of a subclass whose own methods are not asked."""
        self._around.add(id(value))
        try:
            if issubclass(kind, dict):
                self._items(kind.__name__, list(kind.items(value)), depth - 1)
            elif kind is list:
                self._elements("", list.copy(value), "", depth - 1)
            else:
                self._elements(_tag(kind.__name__), list(kind.__iter__(value)), "]}", depth - 1)
        finally:
            self._around.discard(id(value))

    def _elements(self, before: str, values: list[Any], after: str, depth: int) -> None:
        self._reserve(2 * len(values))
        before += "["
        for start in range(0, len(values), _ELEMENTS_AT_A_TIME):
            chunk = values[start : start + _ELEMENTS_AT_A_TIME]
            text = plain_text(chunk, depth, min(self._left, _PLAIN_AT_A_TIME))
            if text is not None:
                self._put(before + text[1:-1])
                before = ","
                continue
            for one in chunk:
                self._put(before)
                self._write(one, depth)
                before = ","
        self._put("]" + after if values else before + "]" + after)

    def _items(self, kind: str, items: list[tuple[Any, Any]], depth: int) -> None:
        self._reserve(4 * len(items))
        if kind == "dict" and all(type(key) is str and key != TAG and _encodable(key) for key, _ in items):
            before = "{"
            for key, one in items:
                self._reserve(len(key))
                self._put(f"{before}{_escaped(key)}:")
                self._write(one, depth)
                before = ","
            self._put("}" if items else "{}")
            return
        self._open_tag(kind)
        self._put("[")
        for place, (key, one) in enumerate(items):
            self._put(",[" if place else "[")
            self._write(key, depth)
            self._put(",")
            self._write(one, depth)
            self._put("]")
        self._put("]]}")

    # -- objects --------------------------------------------------------------------------------------------------

    def _object(self, value: Any, depth: int) -> None:
        """Write a pickle; if there is none, and the class is derived from a builtin one, the value as that."""
        if self._is_left_out(value):
            return
        try:
            data = self._pickle(value)
        except BaseException as exc:
            if self._interrupts.raised(exc) or depth == 0 or id(value) in self._around:
                raise
            if not self._as_builtin(value, depth):
                raise
            return
        self._open_tag("pickle")
        self._pickled(type_name(type(value)), data)
        self._put("]}")

    def _is_left_out(self, value: Any) -> bool:
        if self._objects is Objects.REFUSE:
            raise HasObjectsError
        if self._objects is Objects.LEAVE_OUT:
            self._unstorable(type_name(type(value)), "", self._why)
            return True
        return False

    def _as_builtin(self, value: Any, depth: int) -> bool:
        """Write the value of a subclass, or an array of objects, without its type; whether it is one."""
        kind = type(value)
        if id(kind) in _NESTING:
            return False  # it is no subclass, and too deep, or within itself
        base = next((base for base in _BASES if issubclass(kind, base)), None)
        if kind is getattr(sys.modules.get("numpy"), "ndarray", None):
            self._reserve(2 * value.size)
            self._around.add(id(value))
            self._write_any(value.tolist(), depth)
            self._around.discard(id(value))
        elif base is None:
            return False
        elif base in _SCALAR_BASES:
            if base in _SIZES:
                self._reserve(_SIZES[base](value))
            self._write_any(_SCALAR_BASES[base](value), depth)
        else:
            self._container(value, base, depth)
        return True

    def _pickle(self, value: Any) -> bytes:
        """Return the pickle of a value; raise what its own methods raise if there is none."""
        data: bytes | None = None
        error: BaseException | None = None
        for pickler in (pickle.Pickler, cloudpickle.Pickler):
            sink = _Sink(self._left * 3 // 4)
            try:
                pickler(sink, protocol=5).dump(value)
            except BaseException as exc:
                if self._interrupts.raised(exc) or type(exc) is _TooLarge:
                    raise
                error = exc
                continue
            data = b"".join(sink.chunks)
            if b"__main__" not in data:  # by name, what is in __main__ is found by this process only
                break
        if data is None and error is not None:
            raise error
        return data or b""

    def _pickled(self, name: str, data: Any) -> None:
        self._put(f"[{_escaped(name)},")
        self._base64(data)
        self._put("]")

    def _unstorable(self, name: str, text: str, error: str) -> None:
        self._open_tag("unstorable")
        self._put("[")
        self._str(name)
        self._put(",")
        self._str(text)
        if error:  # as before there were any
            self._put(",")
            self._str(error)
        self._put("]]}")

    def _enum(self, value: Any) -> None:
        if self._is_left_out(value):
            return
        kind = type(value)
        self._open_tag("enum")
        self._put(dumps([text_of(text) for text in (kind.__module__, kind.__qualname__, value.name)])[:-1])
        self._put(',["pickle",')
        self._pickled(type_name(kind), self._pickle(value))
        self._put("]]]}")

    def _numpy(self, value: Any, depth: int) -> None:
        numpy = sys.modules["numpy"]
        kind = type(value)
        dtype = value.dtype if kind is numpy.ndarray or issubclass(kind, numpy.generic) else None
        if kind is numpy.str_:
            self._text("numpy.str", str(value))
        elif kind is numpy.bytes_:
            self._binary("numpy.bytes", bytes(value))
        elif dtype is not None and (dtype.kind in "biufcmM" or (dtype.kind in "US" and dtype.itemsize)):
            shape = list(value.shape) if kind is numpy.ndarray else None
            self._reserve(value.nbytes * 4 // 3)
            self._open_tag("numpy")
            self._put(f"[{_escaped(dtype.str)},{dumps(shape)},")
            self._base64(value.tobytes())
            self._put("]]}")
        else:
            self._object(value, depth)

    # -- leaves ---------------------------------------------------------------------------------------------------

    def _scalar(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > _MAX_DECIMAL_BITS:
            self._reserve(value.bit_length() // 4)
            self._tagged("int", f'"{hex(value)}"')
        else:
            self._put(dumps(value))

    def _str(self, text: str) -> None:
        self._reserve(len(text))
        if not _encodable(text):
            self._binary("str", text.encode("utf-8", "surrogatepass"))
            return
        if len(text) <= _AT_A_TIME:
            self._put(_escaped(text))
            return
        self._put('"')
        for start in range(0, len(text), _AT_A_TIME):
            self._put(_escaped(text[start : start + _AT_A_TIME])[1:-1])
        self._put('"')

    def _base64(self, data: Any) -> None:
        self._reserve(len(data) * 4 // 3)
        self._put('"')
        for start in range(0, len(data), _AT_A_TIME):
            self._put(base64.b64encode(data[start : start + _AT_A_TIME]).decode("ascii"))
        self._put('"')

    def _open_tag(self, kind: str) -> None:
        self._put(_tag(kind))

    def _tagged(self, kind: str, payload: str) -> None:
        self._open_tag(kind)
        self._put(payload)
        self._put("]}")

    def _text(self, kind: str, text: str) -> None:
        self._open_tag(kind)
        self._str(text)
        self._put("]}")

    def _binary(self, kind: str, data: Any) -> None:
        self._open_tag(kind)
        self._base64(data)
        self._put("]}")

    def _datetime(self, value: datetime.datetime | datetime.time) -> None:
        # ISO text holds an offset, not a named zone, nor which side of a clock change it is.
        zone = value.tzinfo
        if zone is None or (type(zone) is datetime.timezone and _is_unnamed(zone)):
            text = value.isoformat()
            self._tagged(type(value).__name__, dumps([text, value.fold] if value.fold else text))
        else:
            self._object(value, 0)

    def _fraction(self, value: fractions.Fraction) -> None:
        self._elements(_tag("Fraction"), [value.numerator, value.denominator], "]}", 0)

    def _opaque(self, value: OpaqueValue) -> None:
        self._open_tag("pickle")
        self._pickled(text_of(value.type_name), value.data)
        self._put("]}")

    def _left_value(self, value: UnstorableValue) -> None:
        self._unstorable(*(text_of(text)[:_MAX_TEXT_LEFT] for text in (value.type_name, value.text, value.error)))


def _tag(kind: str) -> str:
    return f'{{"{TAG}":["{kind}",'


def _encodable(text: str) -> bool:
    """Whether it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_unnamed(zone: datetime.timezone) -> bool:
    return repr(zone) == repr(datetime.timezone(zone.utcoffset(None)))


#: For an instance of a subclass that does not pickle: the builtin class that it is kept as.
_SCALAR_BASES: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    float: float.__pos__,
    int: int.__pos__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
}
#: At least how many characters such a value takes.
_SIZES: dict[type, Callable[[Any], int]] = {
    str: str.__len__,
    int: lambda value: int.bit_length(value) // 4,
    bytes: bytes.__len__,
}
_BASES = (dict, list, tuple, set, frozenset, *_SCALAR_BASES)

_Leaf = Callable[[Writer, Any], None]


def _leaf(kind: str, convert: Callable[[Any], Any] = str) -> _Leaf:
    return lambda writer, value: writer._text(kind, convert(value))


_LEAVES: dict[int, _Leaf] = {
    id(bytes): lambda writer, value: writer._binary("bytes", value),
    id(bytearray): lambda writer, value: writer._binary("bytearray", bytes(value)),
    id(complex): lambda writer, value: writer._tagged("complex", dumps([value.real, value.imag])),
    id(datetime.datetime): Writer._datetime,
    id(datetime.time): Writer._datetime,
    id(datetime.date): _leaf("date"),
    id(datetime.timedelta): lambda writer, value: writer._tagged(
        "timedelta", dumps([value.days, value.seconds, value.microseconds])
    ),
    id(decimal.Decimal): _leaf("Decimal"),
    id(fractions.Fraction): Writer._fraction,
    id(uuid.UUID): _leaf("UUID"),
    id(OpaqueValue): Writer._opaque,
    id(UnstorableValue): Writer._left_value,
    id(pathlib.PurePosixPath): _leaf("PurePosixPath"),
    id(pathlib.PureWindowsPath): _leaf("PureWindowsPath"),
    id(pathlib.PosixPath): _leaf("Path"),
    id(pathlib.WindowsPath): _leaf("Path"),
}
