"""Names of searches and jobs, and the errors about them: one wording for every storage."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

from evalkit.errors import JobNotFoundError, SearchExistsError, SearchNotFoundError, StorageURLError

__all__ = [
    "check_bare_url",
    "check_claim",
    "check_search_id",
    "job_not_found",
    "search_exists",
    "search_not_found",
    "split_job_id",
]

#: How many names are looked at for a close match: an error must not cost what the storage has grown to.
_CLOSE_MATCHES_AMONG = 1000
_SHOWN = 5  # names in an error
#: No search has more jobs than numbers of so many digits count.
_MOST_DIGITS = 18


def split_job_id(job_id: str) -> tuple[str, int]:
    """Split ``"<search>.<number>"`` into the search and the number.

    Raises:
        JobNotFoundError: it is not written as ids are, so that no job can have it (``"7"``, ``"0.07"``, ``"0.-1"``).
    """
    search_id, dot, tail = job_id.rpartition(".")
    canonical = dot and tail.isdecimal() and tail.isascii() and len(tail) <= _MOST_DIGITS
    if not canonical or (tail[0] == "0" and tail != "0"):
        raise job_not_found(job_id)
    return search_id, int(tail)


def check_search_id(search_id: str) -> str:
    """Return a search id as it is.

    Raises:
        ValueError: it is empty or holds a character that a database, a URL or a terminal would trip over.
    """
    if not search_id or not search_id.isprintable():
        raise ValueError(f"a search id is a non-empty string of printable characters, not {search_id!r}")
    return search_id


def check_claim(n: int) -> None:
    """Check how many jobs are to be claimed. Raises ``ValueError`` for less than one."""
    if n < 1:
        raise ValueError(f"a worker claims at least 1 job, not {n}")


def check_bare_url(url: str, scheme: str) -> None:
    """Check the URL of a storage that takes nothing but its scheme.

    Raises:
        StorageURLError: it is of another scheme, or names a place.
    """
    if url not in {f"{scheme}://", f"{scheme}:"}:
        raise StorageURLError(f"not a URL of the {scheme} storage: {url!r}; write '{scheme}://'")


def search_not_found(search_id: str, known: Iterable[str], url: str) -> SearchNotFoundError:
    """The error for a search that is not in the storage at ``url``, with a close match of ``known`` if there is one."""
    names = list(islice(known, _CLOSE_MATCHES_AMONG))
    close = difflib.get_close_matches(search_id, names, n=1)
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif names:
        hint = f"there are {', '.join(map(repr, names[:_SHOWN]))}{', …' if len(names) > _SHOWN else ''}"
    else:
        hint = "there are none"
    return SearchNotFoundError(f"there is no search {search_id!r} in {url}: {hint}", search_id)


def search_exists(search_id: str, url: str) -> SearchExistsError:
    """The error for a search id that is taken."""
    return SearchExistsError(f"there is a search {search_id!r} in {url} already: load it, or choose another id")


def job_not_found(job_id: str) -> JobNotFoundError:
    """The error for a job id that no job has."""
    return JobNotFoundError(f"there is no job {job_id!r}: ids read '<search>.<number>', as create_jobs() returned them")
