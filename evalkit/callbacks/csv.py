"""CSVCallback: one row for each job that ends, in a file that outlives the process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from evalkit.callbacks.base import Callback
from evalkit.callbacks.table import encode_row, records, split_record, text_of, unquote, whole_length
from evalkit.job import Job, JobMetadata, JobState
from evalkit.usercode import attempt
from evalkit.usercode import text_of as said

__all__ = ["CSVCallback"]

logger = logging.getLogger(__name__)

_OBJECTIVE = re.compile(r"objective(?:_(\d+))?")
_METADATA = tuple(f"m:{key}" for key in JobMetadata.KEYS)
_LONGEST_HEADER = 1 << 24  # bytes
_KNOWN = ("search_id", "job_id", "job_status")


class CSVCallback(Callback):
    """Writes one row to a CSV file for each job that ends, in the form that DeepHyper's tools read.

    Columns, in this order:

    - ``p:<name>``: the parameters;
    - ``objective``, or ``objective_0``, ``objective_1``, ... for many objectives;
    - ``o:<key>``: the other entries of an output that is a mapping, ``metadata`` aside; an output that is neither a
      mapping nor an objective stands under ``o:output``;
    - ``search_id``, ``job_id``, ``job_status``: the two parts of the job's id ``"<search>.<number>"``, and its state;
    - ``m:<key>``: the metadata, with what the run function returned as ``metadata``. Timestamps, duration and CPU
      time are in seconds, ``peak_rss`` in bytes. A row is written when its job ends, so ``m:timestamp_gather`` is
      empty unless known then.

    The objective stands as it is, ``nan`` and ``inf`` included. Where there is none because the job failed, was
    cancelled or pruned, stands ``F_<CAUSE>``, such as ``F_CRASH`` or ``F_CANCELLED``, in every objective column.
    Failures that came before the first result of many objectives stand under ``objective`` until then, and in every
    ``objective_i`` afterwards.

    Each row is there, in one write to the end of the file, before the job is gathered, so killing the process loses
    none. The kernel moves a write page by page: who reads, or kills, at that very instant may find the last row cut at
    the end of a page. A file that exists is continued, and a row cut like that is removed first. One process writes a
    file at a time.

    A row with columns that the file lacks widens it: the rows are copied to a temporary file in the same folder, with
    the wider header, that takes the place of the old one atomically. That costs as much as the file is long, once for
    each such row; every other row costs the same however long the file is. Rows that cannot be written, because the
    disk is full for instance, are kept and written with later ones or at the close.

    Args:
        path: of the file; its folder exists. The file is created with the first row.
        include_others: write rows for the jobs that others ended in the same search too.

    Raises:
        ValueError: the folder does not exist, the path is not that of a regular file, or the file there has a header
            that this class does not write.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, include_others: bool = True) -> None:
        # A symbolic link is followed here, so that replacing the file leaves the link in place.
        self._path = os.path.realpath(path)
        self._include_others = include_others
        self._columns: list[str] = []
        self._places: dict[str, int] = {}
        self._objectives: list[int] = []
        self._fd: int | None = None
        self._backlog: list[_Row] = []
        self._retry_at = 0
        folder = os.path.dirname(self._path)
        if not os.path.isdir(folder):
            raise ValueError(f"cannot write {self._path}: the folder {folder} does not exist; create it first")
        if os.path.exists(self._path):
            if not os.path.isfile(self._path):
                raise ValueError(f"cannot write {self._path}: it is not a regular file")
            with open(self._path, "rb") as file:
                _read_header(file, self._path)

    @property
    def path(self) -> str:
        """The absolute path of the file."""
        return self._path

    def on_done(self, job: Job) -> None:
        self._backlog.append(_row_of(job))
        # After a failed write, trying again at every job would write the whole backlog each time.
        if len(self._backlog) >= self._retry_at:
            self._flush()

    def on_done_other(self, job: Job) -> None:
        if self._include_others:
            self.on_done(job)

    def on_close(self) -> None:
        try:
            if self._backlog:
                self._flush()
        finally:
            self._close()

    def _flush(self) -> None:
        self._retry_at = 2 * len(self._backlog)
        fd = self._opened()
        missing: dict[str, None] = {}
        for row in self._backlog:
            missing.update(dict.fromkeys(name for name in row.cells if name not in self._places))
        # A file of another hand may have no objective, so no place for a failure.
        if missing or not self._objectives:
            fd = self._widen(fd, missing)
        _append(fd, b"".join(self._encode(row) for row in self._backlog))
        self._backlog = []
        self._retry_at = 0

    def _encode(self, row: _Row) -> bytes:
        cells = [""] * len(self._columns)
        for name, text in row.cells.items():
            cells[self._places[name]] = text
        if row.failure is not None:
            for place in self._objectives:
                cells[place] = row.failure
        return encode_row(cells)

    def _opened(self) -> int:
        """The descriptor to append to; the file is opened anew if another one has taken its place, or none is left."""
        if self._fd is not None:
            if self._in_place(self._fd):
                return self._fd
            self._close()
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _lock(fd, self._path)
            if not self._in_place(fd):
                raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing this file", self._path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
            with open(fd, "rb", closefd=False) as file:
                columns = _read_header(file, self._path)
                length = whole_length(file)
            torn = os.fstat(fd).st_size - length
            if torn:
                os.ftruncate(fd, length)
                logger.warning("%s: cut off a half-written last row of %d bytes", self._path, torn)
        except BaseException:
            os.close(fd)
            raise
        self._use(fd, columns)
        return fd

    def _in_place(self, fd: int) -> bool:
        """Whether a descriptor is still that of the file at the path."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _widen(self, fd: int, missing: Iterable[str]) -> int:
        """Put a file in place that has the missing columns too; return its descriptor."""
        old = self._columns
        names = [*old, *missing]
        if not any(_OBJECTIVE.fullmatch(name) for name in names):
            names.append("objective")
        names += [name for name in (*_KNOWN, *_METADATA) if name not in names]
        with open(fd, "rb", closefd=False) as source:
            if "objective" in old and "objective" not in missing and _many(names) and _only_failures(source, old):
                names.remove("objective")
            names.sort(key=_place)
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            # It has to be new: in a folder of many users, somebody may have put a link there.
            new = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, mode)
            try:
                _lock(new, self._temporary)
                with open(new, "wb", closefd=False) as target:
                    os.fchmod(new, mode)
                    target.write(encode_row(names))
                    _copy_rows(source, target, old, names)
                os.fsync(new)
                os.replace(self._temporary, self._path)
            except BaseException:
                os.close(new)
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary)
                raise
        self._close()
        self._use(new, names)
        return new

    @property
    def _temporary(self) -> str:
        # One name, so that what a killed process left is cleared by the next; the lock on the file guards it.
        folder, name = os.path.split(self._path)
        return os.path.join(folder, f".{name}.tmp")

    def _use(self, fd: int, columns: list[str]) -> None:
        self._fd = fd
        self._columns = columns
        self._places = {name: place for place, name in enumerate(columns)}
        self._objectives = [place for place, name in enumerate(columns) if _OBJECTIVE.fullmatch(name)]

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class _Row:
    """The cells of a job by column; ``failure`` is what stands in every objective column, if not an objective."""

    cells: dict[str, str]
    failure: str | None


def _row_of(job: Job) -> _Row:
    cells = {f"p:{said(name)}": text_of(value) for name, value in job.args.items()}
    output, objective = job.output, job.objective
    failure: str | None = None
    if isinstance(objective, str):
        failure = text_of(objective)
    elif isinstance(objective, tuple):
        cells.update((f"objective_{index}", text_of(value)) for index, value in enumerate(objective))
    elif objective is not None:
        cells["objective"] = text_of(objective)
    elif job.state is not JobState.DONE:
        failure = f"F_{(job.cause or job.state).value}"
    entries, _ = attempt(_entries, output)
    if entries is not None:
        cells.update((f"o:{key}", text_of(value)) for key, value in entries if key not in ("objective", "metadata"))
    elif objective is None and output is not None:
        cells["o:output"] = text_of(output)
    search, _, number = job.id.rpartition(".")
    cells |= {"search_id": search, "job_id": number, "job_status": job.state.value}
    cells.update((f"m:{key}", text_of(value)) for key, value in job.measured.items())
    return _Row(cells, failure)


def _entries(output: Any) -> list[tuple[str, Any]] | None:
    return [(said(key), value) for key, value in output.items()] if isinstance(output, Mapping) else None


def _place(column: str) -> tuple[int, int]:
    """Where a column stands: its group, and for objectives the place among them."""
    if column.startswith("p:"):
        return 0, 0
    if (match := _OBJECTIVE.fullmatch(column)) is not None:
        return 1, -1 if match[1] is None else int(match[1])
    if column.startswith("o:"):
        return 2, 0
    if column in _KNOWN:
        return 3, _KNOWN.index(column)
    return 4, 0


def _many(columns: Iterable[str]) -> bool:
    return any(column.startswith("objective_") for column in columns)


def _read_header(file: BinaryIO, path: str) -> list[str]:
    """The columns of a file; none for an empty file.

    Raises:
        ValueError: this is not a file that :class:`CSVCallback` writes.
    """
    # Bounded, since what stands there may be anything.
    header = next(records(io.BytesIO(file.read(_LONGEST_HEADER))), None)
    if header is None:
        if file.seek(0, os.SEEK_END) == 0:
            return []
        raise ValueError(f"cannot append to {path}: it has no header line; give another path")
    try:
        columns = [unquote(field) for field in split_record(header)]
    except UnicodeDecodeError:
        raise ValueError(f"cannot append to {path}: its header is not text; give another path") from None
    strange = [
        column
        for column in columns
        if not (column.startswith(("p:", "o:", "m:")) or column in _KNOWN or _OBJECTIVE.fullmatch(column))
    ]
    missing = [column for column in ("job_id", "job_status") if column not in columns]
    if strange or missing or len(set(columns)) < len(columns):
        why = (
            f"has a column {strange[0][:80]!r} that no job has"
            if strange
            else f"lacks the column {missing[0]!r}"
            if missing
            else "names a column twice"
        )
        raise ValueError(f"cannot append to {path}: its header {why}, so it is not a file of jobs; give another path")
    return columns


def _only_failures(source: BinaryIO, columns: Sequence[str]) -> bool:
    place = columns.index("objective")
    rows = records(source)
    next(rows, None)
    return all(_failure(split_record(row)[place]) or not split_record(row)[place] for row in rows)


def _failure(field: bytes) -> bytes:
    """The field itself if it says that the evaluation failed, else nothing."""
    return field if field.startswith((b"F", b'"F')) else b""


def _copy_rows(source: BinaryIO, target: BinaryIO, old: Sequence[str], new: Sequence[str]) -> None:
    """Copy all rows from under the header ``old`` to under the header ``new``."""
    rows = records(source)
    if next(rows, None) is None:
        return
    places = [old.index(name) if name in old else None for name in new]
    fresh = [place for place, name in enumerate(new) if name not in old and _OBJECTIVE.fullmatch(name)]
    known = [place for place, name in enumerate(old) if _OBJECTIVE.fullmatch(name)]
    for row in rows:
        fields = split_record(row)
        copied = [b"" if place is None else fields[place] for place in places]
        if fresh:
            # A failure stands in every objective column, in those that come later too.
            failure = next(filter(None, (_failure(fields[place]) for place in known)), b"")
            for place in fresh:
                copied[place] = failure
        target.write(b",".join(copied) + b"\n")


def _append(fd: int, data: bytes) -> None:
    """Write to the end of the file, all of it or nothing."""
    before = os.fstat(fd).st_size
    view: Any = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.ftruncate(fd, before)
        raise


def _lock(fd: int, path: str) -> None:
    """Hold the file for this process until it is closed, if its file system knows locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing this file", path) from None
    except OSError as error:
        logger.debug("%s: no lock: %s", path, error)
