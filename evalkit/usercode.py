"""Calls of the methods that users' values bring along: ``__repr__``, ``__float__``, ``__class__`` and the like.

Such a method may raise anything, SystemExit and KeyboardInterrupt included, and may return what is no text or number.
Whatever it does, nothing here raises, except for a Ctrl-C of the user's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from evalkit.interrupts import InterruptSeen

__all__ = ["MAX_SIZE", "attempt", "describe_error", "entry_of", "shown", "size_of", "text_of", "type_name"]

T = TypeVar("T")

_MAX_MESSAGE = 1000  # characters of what an exception says
#: Characters of a value that is shown, or written for people to read.
MAX_SIZE = 10_000_000
_NUMBER = 20  # characters, about
_NUMBERS = frozenset(map(id, (int, float, bool, type(None))))
# The descriptors of ``type`` itself: a metaclass may have others of the same names.
_module_of, _name_of = type.__dict__["__module__"].__get__, type.__dict__["__qualname__"].__get__


def attempt(function: Callable[..., T], *args: Any) -> tuple[T | None, BaseException | None]:
    """Call ``function(*args)``; return its result, and what it raised. A real Ctrl-C passes."""
    with InterruptSeen() as seen:
        try:
            return function(*args), None
        except BaseException as exc:
            if seen.raised(exc):
                raise
            return None, exc


def entry_of(mapping: dict[Any, Any], name: str) -> Any:
    """``mapping.get(name)``; None if a key raises that is compared with the name."""
    try:
        return mapping.get(name)
    except BaseException as exc:
        found, error = attempt(mapping.get, name)
        if error is None and not isinstance(exc, Exception):
            raise  # the key does not do it again, so this was Ctrl-C
        return found


def type_name(kind: type) -> str:
    """The qualified name of a class with its module, whatever its metaclass says."""
    module, _ = attempt(_module_of, kind, type(kind))
    name = str.__str__(_name_of(kind, type(kind)))[:_MAX_MESSAGE]
    return f"{str.__str__(module)[:_MAX_MESSAGE]}.{name}" if issubclass(type(module), str) else name


def text_of(value: Any, convert: Callable[[Any], Any] = str) -> str:
    """``str(value)``, or another conversion to text, as a plain ``str``; what went wrong where there is none."""
    text, error = attempt(_plain_text, value, convert)
    if text is not None:
        return text
    return f"<{type_name(type(value))} object: its text raises {type_name(type(error)).removeprefix('builtins.')}>"


def _plain_text(value: Any, convert: Callable[[Any], Any]) -> str:
    return str.__str__(convert(value))  # a __str__ may return an instance of a subclass with methods of its own


def size_of(value: Any) -> int:
    """About how many characters a builtin value or an array would be as text; beyond 10 million it may count no more.

    Raises:
        RecursionError: it holds itself.
    """
    kind = type(value)
    if kind is str or kind is bytes or kind is bytearray:
        return len(value)
    if kind is dict:
        return size_of(list(value)) + size_of(list(value.values()))
    if not (kind is list or kind is tuple or kind is set or kind is frozenset):
        is_array = kind is getattr(sys.modules.get("numpy"), "ndarray", None)
        return int(value.nbytes) if is_array else _NUMBER
    size = _NUMBER * len(value)
    if not _NUMBERS.issuperset(map(id, map(type, value))):
        for one in value:
            size += size_of(one)
            if size > MAX_SIZE:
                break
    return size


def shown(value: Any, longest: int = 10_000) -> str:
    """The ``repr`` of a value, cut to so many characters. What is very large is counted, not shown."""
    kind = type(value)
    if kind is str or kind is bytes or kind is bytearray:
        value = value[:longest]  # repr() copies, and it may be as large as memory
    elif (attempt(size_of, value)[0] or 0) > MAX_SIZE:
        is_array = hasattr(value, "dtype")
        return f"an array of {value.shape} {value.dtype.name}" if is_array else f"{len(value):,} elements"
    return text_of(value, repr)[:longest]


def describe_error(error: BaseException | None) -> str:
    """An exception as ``"RuntimeError: working outside of context"``, cut to about 1,000 characters."""
    name = type_name(type(error)).removeprefix("builtins.")
    said = text_of(error)[:_MAX_MESSAGE]
    return f"{name}: {said}" if said else name
