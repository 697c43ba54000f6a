"""What ``evalkit show JOB`` shows: one job, with all that is stored of it."""

from __future__ import annotations

import time

from rich.text import Text

from evalkit.cli.console import out
from evalkit.cli.records import job_of
from evalkit.errors import SearchNotFoundError
from evalkit.storage.base import JobRecord, Storage
from evalkit.usercode import MAX_SIZE, shown, text_of

__all__ = ["find_job", "show_job"]


def find_job(storage: Storage, name: str) -> JobRecord | None:
    """The job of that id; None if it is not of the form of an id, or there is no such search.

    Raises:
        JobNotFoundError: there is such a search, and no such job in it.
    """
    search, _, number = name.rpartition(".")
    if not search or not (number.isascii() and number.isdecimal()):
        return None
    try:
        storage.load_search(search)
    except SearchNotFoundError:
        return None
    return storage.load_jobs(search, ids=[name])[0]


def show_job(storage: Storage, record: JobRecord) -> None:
    """Print the job, and what it printed."""
    facts: dict[str, object] = {"state": record.state.value}
    if record.cause is not None:
        facts["cause"] = record.cause.value
    facts["created"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
    facts |= {key: record.metadata[key] for key in ("worker", "host", "pid") if key in record.metadata}
    if record.metadata.get("resources"):
        facts["resources"] = ", ".join(f"{kind} {unit}" for kind, unit in job_of(record).resources.items())
    if record.attempt:
        facts["attempt"] = record.attempt
    for one in job_of(record).attempts:
        took = "" if one.duration is None else f" after {one.duration:,.6g} s"
        where = "" if one.worker is None else f" on {one.worker} of {one.host}"
        facts[f"attempt {one.attempt} ended"] = f"{one.cause.value}{took}{where}: {one.error}: {one.message}"
    for key, unit in (("duration", "s"), ("cpu_time", "s"), ("peak_rss", "bytes")):
        value = record.metadata.get(key)  # the run function may have returned metadata of that name
        if isinstance(value, int | float):
            facts[key] = f"{value:,.6g} {unit}" if unit == "s" else f"{value:,} {unit}"
        elif value is not None:
            facts[key] = shown(value)
    facts |= {f"  {name}": text_of(value) for name, value in record.args.items()}
    if record.is_complete and record.error is None:
        facts["output"] = shown(record.output, MAX_SIZE)
    for number, values in enumerate(record.records):
        facts[f"record {number}"] = ", ".join(f"{name}={shown(value)}" for name, value in values.items())
    console = out()
    console.print(f"job {record.id} in {storage.url}")
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(Text(f"  {name:{width}}  {value}"))
    if record.error is not None:
        console.print(Text(f"error: {record.error}"))
        if record.error.traceback:
            console.print(Text(record.error.traceback.rstrip()))
    log = storage.load_log(record.id)
    console.print("it printed nothing that was kept" if not log else "log:")
    if log:
        console.print(Text.from_ansi(log.rstrip("\n")))
