"""Values as JSON text, with their types.

What JSON holds is plain JSON, written at the cost of ``json.dumps``. What it would change in silence (a tuple, an int
key, a numpy float) or cannot hold is written as a tagged object, ``{"__evalkit__": [kind, payload]}``; a user's dict
with that very key is tagged itself, so it survives. An object of any other type is kept as a pickle in base64. Opening
a pickle runs code, so :func:`decode` does it only with ``allow_pickle=True`` and hands out an :class:`OpaqueValue`
otherwise. What cannot be kept leaves an :class:`UnstorableValue` in its place, which says what it was and why.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import fractions
import json
import pathlib
import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from evalkit.errors import StorageFormatError
from evalkit.limited import CallTimeoutError, call_within
from evalkit.storage.left_values import OpaqueValue, UnstorableValue
from evalkit.storage.plain import MAX_DEPTH, MAX_TEXT, TAG, plain_text
from evalkit.storage.writer import HasObjectsError, Objects, Writer
from evalkit.usercode import attempt

__all__ = ["LONGEST", "OpaqueValue", "UnstorableValue", "decode", "encode"]

#: Seconds that the methods of the objects in a value may take while it is encoded.
LONGEST = 30.0


def encode(value: Any) -> str:
    """Write a value as ASCII JSON text, from which :func:`decode` makes an equal value of the same types.

    Nothing that it is given makes it raise, and the text has at most 200 million characters: what does not fit leaves
    an :class:`UnstorableValue`, and so do objects whose methods take longer than :data:`LONGEST`. numpy is not
    imported: a numpy value can only come from a program that has.
    """
    text = plain_text(value, MAX_DEPTH, MAX_TEXT)
    if text is not None:
        return text
    try:
        return Writer(Objects.REFUSE).text(value)
    except HasObjectsError:
        pass
    try:
        return call_within(LONGEST, Writer(Objects.WRITE).text, value)
    except CallTimeoutError:
        why = f"the methods of the objects that were to be stored together took longer than {LONGEST:g} s"
        return Writer(Objects.LEAVE_OUT, why).text(value)


def decode(text: str, *, allow_pickle: bool = False) -> Any:
    """Read what :func:`encode` wrote.

    Args:
        text: the JSON text.
        allow_pickle: unpickle what was pickled; do it only for what you, or one you trust, have written. A pickle that
            does not open here (its module is not installed, …) is handed out as an :class:`OpaqueValue` nevertheless.

    Raises:
        StorageFormatError: it is not what ``encode`` of this or an older evalkit wrote.
    """
    if allow_pickle and TAG in text:
        value, error = attempt(_read, text, _open)
        if error is None:
            return value  # else what was unpickled does not even go into its container: let it stay closed
    return _read(text, _show)


def _read(text: str, hook: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        return json.loads(text, object_hook=hook) if TAG in text else json.loads(text)
    except (StorageFormatError, MemoryError):
        raise
    except Exception as exc:  # each kind is read in its own way, and each fails in its own
        raise StorageFormatError(f"a stored value does not read ({exc}): {text[:80]!r}") from exc


def _show(found: dict[str, Any]) -> Any:
    tagged = found.get(TAG)
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
    opened, error = attempt(value.open)
    return opened if error is None else value  # it is not lost, and its open() says what is wrong


def _enum(payload: list[Any]) -> Any:
    module, qualname, name, (kind, pickled) = payload
    member, _ = attempt(_member, module, qualname, name)
    return _READERS[kind](pickled) if member is None else member


def _member(module: str, qualname: str, name: str) -> Any:
    """Find the member where its class is loaded already; import nothing, since importing runs code."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = None if found is None else vars(found).get(part)
    is_enum = isinstance(found, type) and issubclass(found, enum.Enum) and name in found.__members__
    return found[name] if is_enum else None


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
