"""The cost of evalkit per job, for a run function that does nothing, beside its peers in the same run.

    python benchmarks/overhead.py                                    # 1,000, 10,000 and 100,000 jobs, three rounds
    python benchmarks/overhead.py --sizes 1000 --rounds 5 --only process ProcessPool joblib
    python benchmarks/overhead.py --json overhead.json

Each measurement has a process of its own, with warm workers; the rounds are interleaved, so that whatever else the
machine does hits all of them alike; figures are medians. The times say how large things are, the ratios are what to
compare. Peers that take too long, or whose cost grows with the number of jobs, get fewer jobs; ratios then use their
largest size, and say so. What is not installed is left out, with a line. Memory is by how much the resident memory of
the main process had grown at its peak, per job, in those same processes; it includes what the caller holds, for ALL
every job.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cases import CASES, WORKERS, Sample, missing
from measure import MeasurementError, in_fresh_process, machine, median, print_table, write_json

__all__ = ["main", "sample"]


@dataclass(frozen=True, slots=True)
class Bar:
    """How much of what a peer costs evalkit may cost: at most ``ratio``, better ``goal``."""

    case: str
    peer: str
    mode: str
    ratio: float | None = None
    goal: float | None = None


BARS = (
    Bar("evalkit process", "ProcessPoolExecutor", "ALL", 1 / 15, 1 / 40),
    Bar("evalkit process", "joblib", "ALL", goal=1.0),
    Bar("evalkit process", "Pool.imap_unordered", "ALL"),
    Bar("evalkit process", "ProcessPoolExecutor", "BATCH", 1 / 5),
    Bar("evalkit thread", "ThreadPoolExecutor", "ALL", 1.0),
    Bar("evalkit thread", "ThreadPoolExecutor", "BATCH", 1.0),
    Bar("evalkit serial", "deephyper serial-async", "ALL", 1 / 10),  # DeepHyper's takes coroutines alone
    Bar("evalkit serial", "deephyper serial-async", "BATCH", 1 / 10),
    Bar("evalkit serial-async", "deephyper serial-async", "ALL", 1 / 10),
    Bar("evalkit serial-async", "deephyper serial-async", "BATCH", 1 / 10),
    Bar("evalkit thread", "deephyper thread", "ALL"),
    Bar("evalkit process", "deephyper process", "ALL"),
    Bar("evalkit loky", "loky", "ALL", 1 / 20),
    Bar("evalkit loky", "loky", "BATCH", 1.3),
    Bar("evalkit ray", "ray", "ALL", 1 / 20),
    Bar("evalkit ray", "ray", "BATCH", 1.3),
    Bar("evalkit mpicomm", "mpi4py", "ALL", 1 / 20),
    Bar("evalkit mpicomm", "mpi4py", "BATCH", 1.3),
)
HISTORY_BAR = 1.2  # the largest size beside the smallest, per job
MEMORY_BAR = 1536  # bytes a finished job

#: key of a case -> number of jobs -> the measurements
Samples = dict[str, dict[int, list[Sample]]]


def sample(key: str, size: int) -> dict[str, float] | None:
    """One measurement; called in a process of its own. None in a process that only serves."""
    result = CASES[key].run(size)
    return None if result is None else dataclasses.asdict(result)


def measure(keys: Sequence[str], sizes: Sequence[int], rounds: int, say: Callable[[str], None]) -> Samples:
    samples: Samples = {}
    failed: set[str] = set()
    for number in range(rounds):
        for size in sizes:
            for key in keys:
                case = CASES[key]
                if key in failed or size > case.limit:
                    continue
                say(f"round {number + 1} of {rounds}, {size:,} jobs: {key}")
                try:
                    result = in_fresh_process("overhead", "sample", key, size, launcher=case.launcher)
                except MeasurementError as exc:
                    failed.add(key)
                    print(f"left out: {key}: {exc}")
                else:
                    samples.setdefault(key, {}).setdefault(size, []).append(Sample(**result))
    return samples


def per_job(samples: Samples, key: str, size: int) -> float | None:
    """Microseconds per job at that size, the median; None if it was not measured."""
    values = samples.get(key, {}).get(size)
    return None if not values else median(one.seconds for one in values) / size * 1e6


def memory_per_job(samples: Samples, key: str) -> float | None:
    """Bytes per job at the largest size; None below 10,000 jobs, where allocator pages outweigh them."""
    if key not in samples:
        return None
    size = max(samples[key])
    return None if size < 10_000 else median(one.peak_bytes for one in samples[key][size]) / size


def report(samples: Samples, sizes: Sequence[int]) -> list[dict[str, object]]:
    """Print the tables; return the ratios."""
    rows = []
    for key in samples:
        case = CASES[key]
        capped = f"(max {case.limit:,})"
        cells = [_us(per_job(samples, key, size), capped if size > case.limit else "-") for size in sizes]
        memory = memory_per_job(samples, key)
        rows.append([case.mode, case.name, *cells, "-" if memory is None else f"{memory:,.0f}"])
    rows.sort(key=lambda row: row[0])
    print_table(
        f"microseconds per job ({WORKERS} workers, a function that does nothing, memory storage)",
        ["mode", "what", *(f"{size:,} jobs" for size in sizes), "bytes a job"],
        rows,
    )
    ratios = [*_beside_peers(samples, sizes), *_history(samples, sizes), *_memory(samples)]
    if ratios:
        head = ["mode", "what", "beside", "jobs", "ratio", "bar", "goal", ""]
        print_table("ratios", head, [[str(cell) for cell in row.values()] for row in ratios])
    return ratios


def _beside_peers(samples: Samples, sizes: Sequence[int]) -> list[dict[str, object]]:
    rows = []
    for bar in BARS:
        mine, peer = f"{bar.case}/{bar.mode}", f"{bar.peer}/{bar.mode}"
        largest = max(samples.get(peer, {}), default=None)
        for size in sizes:
            ours = per_job(samples, mine, size)
            at = largest if largest is not None and size > largest else size
            theirs = None if at is None else per_job(samples, peer, at)
            if ours is not None and theirs is not None:
                jobs = f"{size:,}" if at == size else f"{size:,} / {at:,}"
                rows.append(_row(bar.mode, bar.case, bar.peer, jobs, ours / theirs, bar.ratio, bar.goal))
    return rows


def _history(samples: Samples, sizes: Sequence[int]) -> list[dict[str, object]]:
    rows = []
    small, large = min(sizes), max(sizes)
    for key in samples:
        first, last = per_job(samples, key, small), per_job(samples, key, large)
        if key.startswith("evalkit ") and small < large and first is not None and last is not None:
            name, mode = key.split("/")
            rows.append(_row(mode, name, "itself", f"{large:,} / {small:,}", last / first, HISTORY_BAR, None))
    return rows


def _memory(samples: Samples) -> list[dict[str, object]]:
    rows = []
    for key in samples:
        memory = memory_per_job(samples, key)
        if key.startswith("evalkit ") and memory is not None:
            name, mode = key.split("/")
            size = f"{max(samples[key]):,}"
            rows.append(_row(mode, name, f"{MEMORY_BAR:,} B", size, memory / MEMORY_BAR, 1.0, None))
    return rows


def _row(
    mode: str, what: str, beside: str, jobs: str, ratio: float, bar: float | None, goal: float | None
) -> dict[str, object]:
    verdict = "" if bar is None and goal is None else "ok"
    if bar is not None and ratio > bar:
        verdict = "ABOVE THE BAR"
    elif goal is not None:
        verdict = "goal met" if ratio <= goal else "above the goal"
    return {
        "mode": mode,
        "what": what,
        "beside": beside,
        "jobs": jobs,
        "ratio": _ratio(ratio),
        "bar": "" if bar is None else _ratio(bar),
        "goal": "" if goal is None else _ratio(goal),
        "verdict": verdict,
    }


def _ratio(value: float) -> str:
    return f"1/{1 / value:.1f}" if 0 < value < 0.5 else f"{value:.2f}"


def _us(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:,.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="K", help="measurements of each; the median counts")
    names = f"only what has one of these in its name; there are: {', '.join(CASES)}"
    parser.add_argument("--only", nargs="+", metavar="PART", help=names)
    parser.add_argument("--json", metavar="FILE", help="write every measurement there as well")
    options = parser.parse_args(argv)
    if min(options.sizes) < WORKERS or options.rounds < 1:
        parser.error(f"at least {WORKERS} jobs and one round")
    keys = [key for key in CASES if options.only is None or any(part in key for part in options.only)]
    if not keys:
        parser.error(f"nothing is called {' or '.join(options.only)}; there are: {', '.join(CASES)}")
    for reason in dict.fromkeys(f"left out: {CASES[key].name}: {why}" for key in keys if (why := missing(CASES[key]))):
        print(reason)
    keys = [key for key in keys if missing(CASES[key]) is None]
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    sizes = sorted(set(options.sizes))
    samples = measure(keys, sizes, options.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    ratios = report(samples, sizes)
    if options.json:
        raw = {
            key: {str(size): [dataclasses.asdict(one) for one in values] for size, values in by_size.items()}
            for key, by_size in samples.items()
        }
        write_json(options.json, {"workers": WORKERS, "ratios": ratios, "samples": raw})
    return 0 if samples else 1


if __name__ == "__main__":
    sys.exit(main())
