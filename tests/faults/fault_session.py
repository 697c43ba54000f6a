"""A program with one evaluator that meets one fault after another.

::

    python fault_session.py BACKEND OPTIONS FAULT...

After the batch with a fault comes the next one: that it finishes shows that the pool is whole again. What it sees goes
into ``seen.jsonl``, a line as soon as it is known.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fault_jobs import MEMORY, run

from evalkit import Evaluator, Job
from evalkit.engine import recorder
from evalkit.errors import StorageUnavailableError

_OTHERS = 8
_FULL = 200_000  # bytes that a file may have, while the disk is full


def batch(fault: str, first: int, watched: bool) -> list[dict[str, Any]]:
    """Jobs that are well, with the faulty one among them."""
    jobs = [{"x": first + n, "fault": "", "once": False, "watched": watched} for n in range(_OTHERS)]
    if fault:
        jobs.insert(3, {"x": first + _OTHERS, "fault": fault, "once": False, "watched": watched})
    return jobs


def tell(**what: Any) -> None:
    with open("seen.jsonl", "a") as file:
        file.write(json.dumps(what) + "\n")


def gather(evaluator: Evaluator, fault: str) -> tuple[list[Job], int]:
    """All of them, and how often the storage was not there for them."""
    if fault == "held":
        return gather_held(evaluator), 0
    if fault != "disk":
        return evaluator.gather("ALL"), 0
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL, hard))
    try:
        evaluator.gather("ALL")
        refused = 0
    except StorageUnavailableError:
        refused = 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return evaluator.gather("ALL"), refused


def gather_held(evaluator: Evaluator) -> list[Job]:
    """All of them, while no other thread of this program can run for two seconds."""
    reached = Path(os.environ["EVALKIT_FAULTS"]) / "reached-held"
    with ThreadPoolExecutor(1) as pool:
        gathering = pool.submit(evaluator.gather, "ALL")
        while not reached.exists():
            time.sleep(0.01)
        ctypes.PyDLL(None).usleep(2_000_000)
        return gathering.result()


def main(backend: str, options: dict[str, Any], faults: list[str]) -> None:
    options = {"num_workers": 2, "storage": "sqlite:///study.db", "grace": 0.5, **options}
    watched = "job_memory" in options
    if "memory" in faults and not watched:
        try:
            Evaluator.create(run, backend, {"num_workers": 2, "job_memory": MEMORY})
        except ValueError as exc:
            refused = "job_memory" in str(exc)
    recorder._PATIENCE = 0.3  # seconds for which a full disk is tried again
    warnings.simplefilter("ignore")  # of jobs that are abandoned; those are tested elsewhere
    with Evaluator.create(run, backend, options) as evaluator:
        if not evaluator.is_master:
            return
        tell(pid=os.getpid())
        (Path(os.environ["EVALKIT_FAULTS"]) / "program").write_text(str(os.getpid()))
        for number, fault in enumerate([*faults, ""]):
            start = time.monotonic()
            submitted = evaluator.submit(batch(fault, 100 * number, watched))
            jobs, storage_refused = gather(evaluator, fault)
            (culprit,) = [job for job in jobs if job.args["fault"]] or [None]
            others = [job for job in jobs if job is not culprit]
            seen: dict[str, Any] = {
                "fault": fault,
                "seconds": time.monotonic() - start,
                "others": [str(job.state) for job in others if job.output != job.args["x"]],
                "returned": sorted(job.id for job in jobs) == sorted(job.id for job in submitted),
                "pids": sorted({job.metadata.get("pid", 0) for job in others}),
            }
            if culprit is not None:
                seen["state"] = str(culprit.state)
                seen["cause"] = None if culprit.cause is None else str(culprit.cause)
                error = culprit.error
                seen["error"] = None if error is None else [error.type, error.signal, error.exit_code]
                seen["pid"] = culprit.metadata.get("pid")
            if fault == "memory" and not watched:
                seen["refused"] = refused
            if fault == "unstorable":
                (record,) = evaluator.storage.load_jobs(evaluator.search_id, [culprit.id])
                seen["stored"] = [type(record.output).__name__, str(record.state)]
            if fault == "disk":
                seen["refused"] = bool(storage_refused)
                records = evaluator.storage.load_jobs(evaluator.search_id, [job.id for job in jobs])
                seen["stored"] = [record.output for record in records] == [job.output for job in submitted]
            tell(**seen)
        start = time.monotonic()
        evaluator.close()
        tell(closed=time.monotonic() - start)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:])
