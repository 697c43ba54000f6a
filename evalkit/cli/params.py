"""Parameter files: CSV and JSON Lines, read line by line, with errors that name file and line."""

from __future__ import annotations

import csv
import difflib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from evalkit.cli.scalars import parse_scalar
from evalkit.errors import ParametersError

__all__ = ["STDIN", "ParameterFile"]

#: What names standard input in place of a file.
STDIN = "-"
_STANDARD_INPUT = "standard input"
_CSV, _JSON_LINES = (".csv",), (".jsonl", ".ndjson")
_BLOCK = 1 << 16
_CHECK_BELOW = 32 * 2**20  # bytes; a file of up to this size is read through before anything starts
_BOM = b"\xef\xbb\xbf"

Line = tuple[int, str]  # and its number, from 1


class ParameterFile:
    """A file of configurations, one a row or line; iterating opens it and reads as it goes.

    A CSV file has the names in its first line, every row has as many cells, and cells are read as
    :mod:`evalkit.cli.scalars` says; an empty cell is None. A line of JSON Lines is an object. Both are in UTF-8, with
    or without a byte order mark; blank lines are skipped.

    Args:
        path: ends in ``.csv``, ``.jsonl`` or ``.ndjson``; what is not a regular file (a pipe) and ``-``, standard
            input, hold JSON Lines.

    Raises:
        ParametersError: there is no such file, its kind is unknown, or it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = _STANDARD_INPUT if path == STDIN else path
        self._size: int | None = None
        if path != STDIN:
            self._size = _size(path)
        suffix = os.path.splitext(path)[1].lower()
        self._is_csv = suffix in _CSV
        if self._size is not None and suffix not in (*_CSV, *_JSON_LINES):
            raise ParametersError(
                f"parameters come from .csv or .jsonl files, or from {STDIN}; what kind of file is this?", file=path
            )

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        """The configurations; None among them says that the next one has to be waited for.

        Raises:
            ParametersError: what comes next cannot be read; names the line. Or there was nothing at all.
        """
        lines = self._lines()
        any_yet = False
        for configuration in _from_csv(lines, self.name) if self._is_csv else _from_json_lines(lines, self.name):
            any_yet = any_yet or configuration is not None
            yield configuration
        if not any_yet:
            raise ParametersError("the file is empty" if not self._is_csv else "there is no row", file=self.name)

    def check(self) -> int | None:
        """Read the file through, if it can be read twice and is not large: what is wrong is said before anything runs.

        Returns:
            how many configurations there are; for a large file how many lines, which is about the same; None if nobody
            can know.

        Raises:
            ParametersError: as iterating does.
        """
        if self._size is None:
            return None
        if self._size <= _CHECK_BELOW:
            return sum(1 for configuration in self if configuration is not None)
        with _opened(self.path) as file:
            count = 0
            while block := os.read(file.fileno(), 1 << 20):
                count += block.count(b"\n")
        return max(1, count - self._is_csv)

    def _lines(self) -> Iterator[Line | None]:
        if self._size is None:
            return _decoded(self._blocks(), self.name)
        return _decoded(self._whole(), self.name)

    def _whole(self) -> Iterator[bytes | None]:
        with _opened(self.path) as file:
            yield from file

    def _blocks(self) -> Iterator[bytes | None]:
        """Lines of a pipe as they come."""
        # Read without a buffer object, whose lock would hold up the end of the program.
        own = self.path != STDIN
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC) if own else sys.stdin.fileno()
        try:
            parts: list[bytes] = []
            while True:
                yield None
                block = os.read(fd, _BLOCK)
                if not block:
                    break
                *lines, rest = block.split(b"\n")
                for line in lines:
                    yield b"".join((*parts, line, b"\n"))
                    parts.clear()
                if rest:
                    parts.append(rest)
            if parts:
                yield b"".join(parts)
        finally:
            if own:
                os.close(fd)


def _size(path: str) -> int | None:
    """The size of a regular file; None for what is not one."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        folder, name = os.path.split(path)
        names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        close = difflib.get_close_matches(name, names, n=1)
        hint = f", did you mean {os.path.join(folder, close[0])!r}?" if close else ""
        raise ParametersError(f"there is no such file{hint}", file=path) from None
    except (OSError, ValueError) as exc:
        raise ParametersError(f"it cannot be read: {exc}", file=path) from exc
    if stat.S_ISDIR(found.st_mode):
        raise ParametersError("this is a folder, not a file", file=path)
    if not os.access(path, os.R_OK):
        raise ParametersError("it cannot be read: permission denied", file=path)
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _opened(path: str) -> Any:
    try:
        return open(path, "rb")
    except OSError as exc:
        raise ParametersError(f"it cannot be read: {exc.strerror or exc}", file=path) from exc


def _decoded(lines: Iterable[bytes | None], name: str) -> Iterator[Line | None]:
    number = 0
    for line in lines:
        if line is None:
            yield None
            continue
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if b"\0" in line:
            raise ParametersError("there is a NUL byte; is this a text file?", file=name, line=number)
        try:
            yield number, line.decode()
        except UnicodeDecodeError as exc:
            byte = line[exc.start]
            raise ParametersError(
                f"this is not UTF-8: byte 0x{byte:02x} at {exc.start + 1}", file=name, line=number
            ) from None


def _from_csv(lines: Iterator[Line | None], name: str) -> Iterator[dict[str, Any] | None]:
    csv.field_size_limit(sys.maxsize)  # a cell of more than 128 KiB is no error
    reader = csv.reader((line[1] for line in lines if line is not None), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as exc:
            raise ParametersError(f"this is not CSV: {exc}", file=name, line=number) from None
        if not row:
            continue
        if header is None:
            header = _header(row, name, number)
        elif len(row) != len(header):
            raise ParametersError(
                f"the row has {len(row)} cells, and the header names {len(header)}", file=name, line=number
            )
        else:
            yield {column: parse_scalar(cell) for column, cell in zip(header, row, strict=True)}
    if header is None:
        raise ParametersError("the file is empty", file=name)


def _header(row: list[str], name: str, line: int) -> list[str]:
    header = [column.strip() for column in row]
    if "" in header:
        raise ParametersError(f"column {header.index('') + 1} has no name", file=name, line=line)
    seen = set()
    for column in header:
        if column in seen:
            raise ParametersError(f"the column {column!r} is there twice", file=name, line=line)
        seen.add(column)
    return header


def _from_json_lines(lines: Iterator[Line | None], name: str) -> Iterator[dict[str, Any] | None]:
    for numbered in lines:
        if numbered is None:
            yield None
            continue
        number, line = numbered
        if line.isspace():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except RecursionError:
            raise ParametersError("this is nested too deeply", file=name, line=number) from None
        except ValueError as exc:
            reason = exc.msg if isinstance(exc, json.JSONDecodeError) else str(exc)
            hint = "; CSV is read from files, not from standard input" if (name, number) == (_STANDARD_INPUT, 1) else ""
            raise ParametersError(f"this is not JSON: {reason}{hint}", file=name, line=number) from None
        if not isinstance(value, dict):
            raise ParametersError(
                f'each line is a JSON object such as {{"x": 1}}, not {line.strip():.80}', file=name, line=number
            )
        yield value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is there twice")
    return value
