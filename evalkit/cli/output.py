"""--output: a row for each job that has ended, in CSV or JSON Lines."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evalkit.callbacks import Callback, CSVCallback
from evalkit.callbacks.table import records, split_record, unquote
from evalkit.errors import ParametersError
from evalkit.job import Job, JobState
from evalkit.usercode import MAX_SIZE, attempt, shown, size_of, text_of

__all__ = ["JSONLinesCallback", "OutputCallback", "check_output", "json_line", "stored_ids", "writer_for"]

_log = logging.getLogger("evalkit")
_BLOCK = 1 << 16


def check_output(path: str) -> None:
    """Raise ``ParametersError`` if no file of results can be written there."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".csv", ".jsonl"):
        raise ParametersError(f"--output {path}: results are written to a .csv or a .jsonl file")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise ParametersError(f"--output {path}: there is no folder {folder}")
    try:
        # Only trying shows it: permissions do not tell of a full disk or of a file system that takes no files.
        if os.path.exists(path):
            with open(path, "ab"):
                pass
        else:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as exc:
        raise ParametersError(f"--output {path}: {exc.strerror}") from exc


def writer_for(path: str) -> Callback:
    """A callback whose ``on_done(job)`` writes a row to ``path``.

    Raises:
        ParametersError: the file there is not one of results, or cannot be written.
    """
    check_output(path)
    try:
        return CSVCallback(path) if path.lower().endswith(".csv") else JSONLinesCallback(path)
    except (ValueError, OSError) as exc:
        raise ParametersError(f"--output: {exc}") from exc


class OutputCallback(Callback):
    """Writes jobs to a file once they are in the storage, so that no row says more than the storage knows.

    Jobs that were cancelled have no row: a resume runs them again.

    Args:
        writer: what its ``on_done`` is called with.
    """

    def __init__(self, writer: Callback) -> None:
        self._writer = writer
        self._waiting: dict[str, Job] = {}

    @property
    def waiting(self) -> list[Job]:
        """The jobs that ended and are not known to be in the storage."""
        return list(self._waiting.values())

    def on_done(self, job: Job) -> None:
        if job.state is not JobState.CANCELLED:
            self._waiting[job.id] = job

    def on_gather(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self._waiting.pop(job.id, None) is not None:
                self._writer.on_done(job)

    def on_close(self) -> None:
        # What ended while the evaluator closed is gathered by nobody. It stays known as waiting: if the storage did not
        # take it, somebody has to.
        for job in self.waiting:
            self._writer.on_done(job)
        self._writer.on_close()


class JSONLinesCallback(Callback):
    """Writes one line of JSON for each job that ends.

    It holds ``job_id, state, parameters, objective, output``, as far as there are any ``cause, error, records``, and
    ``metadata``. A line is one write to the end of the file. A file that exists is continued; a last line that was cut
    short, by a kill in the midst of a write, is removed. NaN and ±inf are written as Python and JavaScript call them.

    Raises:
        ValueError: the file there holds something else.
        OSError: it cannot be opened, or another process is writing it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.realpath(path)
        self._fd: int | None = None
        if os.path.exists(self._path):
            with open(self._path, "rb") as file:
                first = file.readline(1 << 24)
            if first.endswith(b"\n") and not first.startswith(b'{"job_id":'):
                raise ValueError(f"cannot append to {self._path}: its first line is not a job; give another path")

    def on_done(self, job: Job) -> None:
        if self._fd is None:
            self._fd = _open_whole(self._path)
        data = json_line(job)
        before = os.fstat(self._fd).st_size
        view: Any = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except BaseException:
            os.ftruncate(self._fd, before)
            raise

    def on_close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def json_line(job: Job) -> bytes:
    """A job as a line of JSON."""
    entry: dict[str, Any] = {
        "job_id": job.id,
        "state": job.state.value,
        "parameters": job.args,
        "objective": job.objective,
        "output": job.output,
    }
    if job.cause is not None:
        entry["cause"] = job.cause.value
    if job.error is not None:
        entry["error"] = {name: value for name, value in asdict(job.error).items() if value not in (None, "")}
    if job.records:
        entry["records"] = job.records
    entry["metadata"] = dict(job.measured)
    return json.dumps({name: _plain(value, 0) for name, value in entry.items()}).encode() + b"\n"


def stored_ids(path: str) -> set[str]:
    """The ids of the jobs that a file of results holds."""
    if not os.path.exists(path):
        return set()
    with open(path, "rb") as file:
        if path.lower().endswith(".csv"):
            rows = records(file)
            header = [unquote(field) for field in split_record(next(rows, b""))]
            if not {"search_id", "job_id"} <= set(header):
                return set()
            places = header.index("search_id"), header.index("job_id")
            return {".".join(unquote(split_record(row)[place]) for place in places) for row in rows}
        ids = set()
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                ids.add(json.loads(line)["job_id"])
        return ids


def _open_whole(path: str) -> int:
    """Open a file to append to, without the beginning of a line at its end."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as exc:
            _log.debug("%s: no lock: %s", path, exc)
        size = whole = os.fstat(fd).st_size
        while whole:
            start = max(0, whole - _BLOCK)
            newline = os.pread(fd, whole - start, start).rfind(b"\n")
            whole = start + newline + 1
            if newline >= 0:
                break
        if whole < size:
            os.ftruncate(fd, whole)
            _log.warning("%s: cut off a half-written last line of %d bytes", path, size - whole)
    except BaseException:
        os.close(fd)
        raise
    return fd


_MAX_DEPTH = 100
_LARGEST_INT = 10_000  # bits; Python writes no much longer ones in decimal


def _plain(value: Any, depth: int) -> Any:
    """A value as JSON can hold it; what it cannot hold is what ``repr`` says of it, or a word on what it is."""
    kind = type(value)
    if kind is int and value.bit_length() > _LARGEST_INT:
        return hex(value)
    if value is None or kind is int or kind is float or kind is bool:
        return value
    plain, error = attempt(_part, value, depth)
    return plain if error is None else text_of(value, repr)


def _part(value: Any, depth: int) -> Any:
    is_large = size_of(value) > MAX_SIZE
    if isinstance(value, Mapping) and depth <= (1 if is_large else _MAX_DEPTH):
        return {text_of(name): _plain(one, depth + 1) for name, one in value.items()}
    if is_large:
        return shown(value, 100)
    if isinstance(value, enum.Enum):
        return _plain(value.value, depth + 1)
    if isinstance(value, str):
        return str.__str__(value)
    if depth > _MAX_DEPTH:
        return text_of(value, repr)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one, depth + 1) for one in value]
    tolist: Callable[[], Any] | None = getattr(value, "tolist", None)  # arrays and scalars of NumPy, and alike
    if tolist is not None and hasattr(value, "dtype"):
        plain = tolist()
        return _plain(plain, depth + 1) if type(plain) is not type(value) else text_of(value)
    isoformat: Callable[[], str] | None = getattr(value, "isoformat", None)
    return text_of(value, repr) if isoformat is None else text_of(isoformat())
