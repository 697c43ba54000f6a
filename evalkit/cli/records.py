"""Reading the records of a search: in pages, as jobs, and which of them count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from evalkit.errors import JobNotFoundError, StorageURLError
from evalkit.job import Job, JobState
from evalkit.plugins import plugins
from evalkit.storage.base import JobRecord, SearchRecord, Storage
from evalkit.usercode import text_of

__all__ = [
    "SUPERSEDED",
    "config_key",
    "has_failed",
    "is_settled",
    "iterate",
    "job_of",
    "open_existing",
    "superseded",
]

#: Values of a search whose names start so say which jobs were run again under another id: ``{"ids": {id: state},
#: "jobs": n}``. It is written before the new jobs are created, when there were ``n`` jobs: if there are still ``n``,
#: a kill has come between.
SUPERSEDED = "cli.superseded."
_PAGE = 4096


def open_existing(url: str) -> Storage:
    """Open a storage to read in it.

    Raises:
        StorageError, PluginError: it cannot be opened; or it is a file that does not exist, which opening would create.
    """
    if url.partition("://")[0].partition("+")[0].lower() == "sqlite":
        from evalkit.storage.sql_url import SQLAddress

        path = SQLAddress.parse(url).path
        if path is not None and not path.exists():
            raise StorageURLError(f"there is no database {path}; name the one to read with --storage URL")
    return plugins().open_storage(url)


def iterate(storage: Storage, search_id: str) -> Iterator[JobRecord]:
    """All records of a search, by number, a page in memory at a time."""
    total = sum(storage.count_jobs(search_id).values())
    for start in range(0, total, _PAGE):
        numbers = range(start, min(start + _PAGE, total))
        try:
            yield from storage.load_jobs(search_id, ids=[f"{search_id}.{number}" for number in numbers])
        except JobNotFoundError:
            # Numbers grow, and a storage may leave gaps: then there is no way but to read what is left in one go.
            yield from (record for record in storage.load_jobs(search_id) if record.number >= start)
            return


def job_of(record: JobRecord) -> Job:
    """The job of a record, for callbacks."""
    job = Job(record.id, record.args, number=record.number)
    job.restore(
        record.state, record.output, record.error, record.cause, record.attempt, record.records, record.metadata
    )
    return job


def superseded(storage: Storage, search: SearchRecord) -> dict[str, str]:
    """The jobs that were run again under another id: id -> the state they had."""
    total = sum(storage.count_jobs(search.id).values())
    return {
        job_id: state
        for name, note in search.values.items()
        if name.startswith(SUPERSEDED) and note["jobs"] < total
        for job_id, state in note["ids"].items()
    }


def is_settled(record: JobRecord) -> bool:
    """Whether a record says how its configuration ended; one that was cancelled, or never came to an end, does not."""
    return record.state in (JobState.DONE, JobState.FAILED, JobState.PRUNED)


def has_failed(record: JobRecord) -> bool:
    """Whether it failed, or returned an objective that says so (``"F_…"``, NaN, ±inf)."""
    return record.state is JobState.FAILED or (record.state is JobState.DONE and record.objective_failed)


def config_key(args: Mapping[str, Any]) -> bytes:
    """What makes two configurations the same: names and values, with their types (1 is not 1.0), in any order."""
    try:
        text = json.dumps(args, sort_keys=True, default=_text)
    except (TypeError, ValueError, RecursionError):
        text = _text(sorted(args.items()))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _text(value: Any) -> str:
    return text_of(value, repr)
