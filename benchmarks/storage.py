"""The cost of a job that is kept: evalkit with a SQLite file, `gather("BATCH", 1)`, beside Optuna with one.

    python benchmarks/storage.py                       # 5,000 jobs; 200 trials of Optuna, if it is installed
    python benchmarks/storage.py --history 1000000     # also: does the cost grow with the number of jobs?

The run function does nothing, on the thread backend, one job out, so that what is left is the storage: each job that
comes back is on the disk. A raw commit is one row inserted and committed by the sqlite3 of Python, in WAL mode with
synchronous NORMAL. Each measurement has a process and a file of its own; rounds are interleaved; figures are medians.
With `--history N`, N jobs go through one search, and the last of them are compared with those after job 1,000.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from measure import in_fresh_process, machine, median, print_table, spread, write_json

__all__ = ["history", "main", "sample"]

BAR = 1 / 100  # of Optuna's RDB storage
HISTORY_BAR = 1.2
WINDOW = 2_000  # jobs over which the cost at one point of the history is measured
START = 1_000  # the job at which the first window begins


def noop(job: Any) -> float:
    return job["x"]


def evalkit_jobs(url: str, n: int, method: str = "thread") -> Iterator[None]:
    """Run n jobs one by one; yields after each."""
    from evalkit import Evaluator

    with Evaluator.create(noop, method, {"storage": url}) as evaluator:
        for number in range(n):
            evaluator.submit([{"x": float(number)}])
            (job,) = evaluator.gather("BATCH", 1)
            job.get_results()
            yield


def optuna_trials(storage: Any, n: int) -> Iterator[None]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(0))
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0.0, 1.0))
        yield


def optuna_journal(folder: str, n: int) -> Iterator[None]:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return optuna_trials(JournalStorage(JournalFileBackend(os.path.join(folder, "journal.log"))), n)


def raw_commits(path: str, n: int) -> Iterator[None]:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, args TEXT, output TEXT)")
    for number in range(n):
        connection.execute("INSERT INTO job (args, output) VALUES (?, ?)", (f'{{"x": {number}}}', str(number)))
        connection.commit()
        yield
    connection.close()


WAYS: dict[str, Callable[[str, int], Iterator[None]]] = {
    "evalkit sqlite": lambda folder, n: evalkit_jobs(f"sqlite:///{folder}/jobs.db", n),
    "evalkit memory": lambda _, n: evalkit_jobs("memory://", n),
    "raw SQLite commit": lambda folder, n: raw_commits(f"{folder}/raw.db", n),
    "Optuna RDB (SQLite)": lambda folder, n: optuna_trials(f"sqlite:///{folder}/optuna.db", n),
    "Optuna journal": optuna_journal,
}


def sample(way: str, n: int) -> float:
    """Microseconds per job, once; called in a process of its own."""
    warm = max(1, n // 20)
    with tempfile.TemporaryDirectory() as folder:
        run = WAYS[way](folder, warm + n)
        for _ in range(warm):
            next(run)
        start = time.perf_counter()
        for _ in range(n):
            next(run)
        seconds = time.perf_counter() - start
        run.close()
    return seconds / n * 1e6


def history(total: int) -> list[float]:
    """Microseconds per job from job START on, and up to job ``total``; what lies between goes through in bulk."""
    with tempfile.TemporaryDirectory() as folder:
        run = _with_history(f"sqlite:///{folder}/jobs.db", total)
        return list(run)


def _with_history(url: str, total: int) -> Iterator[float]:
    from evalkit import Evaluator

    with Evaluator.create(noop, "thread", {"storage": url}) as evaluator:

        def in_bulk(n: int) -> None:
            while n > 0:
                evaluator.submit([{"x": 0.0}] * min(n, 10_000))
                evaluator.gather("ALL")
                n -= 10_000

        def window() -> float:
            start = time.perf_counter()
            for _ in range(WINDOW):
                evaluator.submit([{"x": 0.0}])
                evaluator.gather("BATCH", 1)
            return (time.perf_counter() - start) / WINDOW * 1e6

        in_bulk(START)
        yield window()
        in_bulk(total - START - 2 * WINDOW)
        yield window()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5_000, metavar="N")
    parser.add_argument("--trials", type=int, default=200, metavar="N", help="of Optuna")
    parser.add_argument("--rounds", type=int, default=3, metavar="K", help="measurements of each; the median counts")
    parser.add_argument("--history", type=int, metavar="N", help="compare job N with job 1,000; at least 10,000")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there as well")
    options = parser.parse_args(argv)
    if options.history is not None and options.history < 10_000:
        parser.error("--history takes at least 10,000 jobs")
    optuna = importlib.util.find_spec("optuna") is not None
    if not optuna:
        print("left out: Optuna is not installed")
    ways = [way for way in WAYS if optuna or not way.startswith("Optuna")]
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            n = options.trials if way.startswith("Optuna") else options.jobs
            samples[way].append(in_fresh_process("storage", "sample", way, n))
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    ours = median(samples["evalkit sqlite"])
    rows = []
    for way, values in samples.items():
        ratio = ours / median(values)
        bar = "1/100" if way == "Optuna RDB (SQLite)" else ""
        verdict = "" if not bar else "ok" if ratio <= BAR else "ABOVE THE BAR"
        text = f"1/{1 / ratio:.0f}" if ratio < 0.1 else f"{ratio:.2f}"
        rows.append([way, f"{median(values):,.1f}", spread(values), text, bar, verdict])
    head = ["what", "us a job", "range", "evalkit sqlite / this", "bar", ""]
    print_table(f"one job at a time, {options.jobs:,} jobs ({options.trials:,} trials of Optuna)", head, rows)
    result: dict[str, Any] = {"jobs": options.jobs, "trials": options.trials, "samples": samples}
    if options.history:
        first, last = result["history"] = in_fresh_process("storage", "history", options.history, timeout=3600.0)
        verdict = "ok" if last / first <= HISTORY_BAR else "ABOVE THE BAR"
        row = [f"{first:,.1f}", f"{last:,.1f}", f"{last / first:.2f}", f"{HISTORY_BAR}", verdict]
        print_table(
            "sqlite, us a job", [f"from job {START:,}", f"to job {options.history:,}", "ratio", "bar", ""], [row]
        )
    if options.json:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
