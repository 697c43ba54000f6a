"""CSV as bytes: cells of any value, and records that are told apart without parsing their fields.

A record ends at a newline outside of quotes. That is all that repairing, widening and appending need, so fields of
any length pass through as they are, which the ``csv`` module with its limit of 128 KiB for each field would refuse to
read back.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from evalkit.usercode import MAX_SIZE, attempt, shown, size_of
from evalkit.usercode import text_of as said

__all__ = ["encode_row", "records", "split_record", "text_of", "unquote", "whole_length"]

_CHUNK = 1 << 20
# The csv module of Python before 3.13 leaves a carriage return bare, at which every reader breaks the row.
_NEEDS_QUOTES = re.compile(r'[",\r\n\0]|^\s|\s$')
_FIELD = re.compile(rb'(?:^|,)("[^"]*(?:""[^"]*)*"|[^,]*)')


def text_of(value: Any) -> str:
    """A value as the text of one cell.

    None is empty; numbers, NumPy scalars among them, are plain (``0.1``, ``nan``, ``inf``); an enum is its value;
    lists, tuples, mappings and arrays are JSON, and what JSON cannot hold is what ``str`` says of it. What would be
    longer than 10 million characters, or has methods that raise, is a word on what it is.
    """
    if value is None:
        return ""
    text, _ = attempt(_text_of, value)
    return said(value) if text is None else text


def _text_of(value: Any) -> str:
    if size_of(value) > MAX_SIZE:
        return shown(value, 100)
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool):
        return str(value)
    # NumPy's float64 is a float whose repr is not a number.
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, int):
        try:
            return int.__repr__(value)
        except ValueError:  # Python refuses more than 4,300 decimal digits
            return hex(value)
    plain = _plain(value)
    if plain is not value:
        return text_of(plain)
    if isinstance(value, dict | list | tuple):
        try:
            return json.dumps(value, ensure_ascii=False, default=_jsonable)
        except (TypeError, ValueError, RecursionError):
            return said(value)
    return said(value)


def encode_row(cells: Iterable[str]) -> bytes:
    """One record, newline included, in UTF-8; a lone surrogate, which UTF-8 cannot hold, is written as ``\\udc80``."""
    quoted = [f'"{cell.replace(chr(34), chr(34) * 2)}"' if _NEEDS_QUOTES.search(cell) else cell for cell in cells]
    return (",".join(quoted) + "\n").encode("utf-8", "backslashreplace")


def whole_length(file: BinaryIO) -> int:
    """How many bytes from the start of ``file`` are whole records; what follows is the beginning of one."""
    file.seek(0)
    whole = offset = 0
    quoted = False
    while chunk := file.read(_CHUNK):
        end = len(chunk)
        quoted ^= chunk.count(b'"') % 2 == 1
        # From the end backwards: each quote passed on the way turns inside into outside.
        inside = quoted
        while True:
            quote = chunk.rfind(b'"', 0, end)
            newline = -1 if inside else chunk.rfind(b"\n", quote + 1, end)
            if newline >= 0:
                whole = offset + newline + 1
                break
            if quote < 0:
                break
            end = quote
            inside = not inside
        offset += len(chunk)
    return whole


def records(file: BinaryIO) -> Iterator[bytes]:
    """The whole records of ``file`` from its start, without their line ends."""
    file.seek(0)
    parts: list[bytes] = []
    inside = False
    for line in file:
        parts.append(line)
        inside ^= line.count(b'"') % 2 == 1
        if not inside and line.endswith(b"\n"):
            yield b"".join(parts)[:-1].removesuffix(b"\r")
            parts = []


def split_record(record: bytes) -> list[bytes]:
    """The fields of a record as they stand there, in their quotes if they have any."""
    return _FIELD.findall(record) if b'"' in record else record.split(b",")


def unquote(field: bytes) -> str:
    """What a field says.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    if len(field) >= 2 and field.startswith(b'"') and field.endswith(b'"'):
        field = field[1:-1].replace(b'""', b'"')
    return field.decode()


def _plain(value: Any) -> Any:
    """Arrays and scalars of NumPy, and of what follows its protocol, as Python's own; everything else as it is."""
    if hasattr(value, "dtype") and callable(getattr(value, "tolist", None)):
        plain = value.tolist()
        # A scalar that Python has no type for, such as a long double, gives itself back.
        return plain if type(plain) is not type(value) else said(value)
    return value


def _jsonable(value: Any) -> Any:
    plain, error = attempt(_plain, value)
    if error is not None:
        return said(value)
    if plain is not value:
        return plain
    return list(value) if type(value) is set or type(value) is frozenset else said(value)
