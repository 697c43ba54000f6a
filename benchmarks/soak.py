"""A soak: many jobs, one in fifty of which crashes, hangs or takes too much memory, and a master that is killed again
and again and resumed.

::

    python benchmarks/soak.py                       # 20,000 jobs, 10 kills: a few minutes
    python benchmarks/soak.py --jobs 500 --kills 2  # a taste of it

It runs ``evalkit run --resume`` on the process backend, with records in SQLite, and looks at it from outside: at what
the jobs themselves write down, at the processes there are, and at what is stored. It prints what it found, and exits
with 1 if anything of this does not hold:

- every configuration has exactly one record that counts, with the end that its job must have come to;
- what was stored as ended before a kill is stored unchanged after it;
- a kill makes no more configurations run twice than there are workers, be it that they were running, or over and not
  stored yet;
- no process outlives a kill by 5 seconds, and none is left at the end;
- the master's descriptors, memory and child processes do not grow with the jobs.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import inspect
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from measure import print_table

from evalkit import RunningJob
from evalkit.backends.process.pool import ProcessBackend
from evalkit.cli.records import is_settled, iterate, superseded
from evalkit.plugins import plugins
from evalkit.storage.base import JobRecord, Storage

__all__ = ["main", "work"]

_ONE_IN = 50
_SEARCH = "soak"
_JOB_TIMEOUT = 2.5  # seconds
_MEMORY = 400  # MB that a job may take, where the backend watches it
_BALLOON = 300  # MB more that a balloon takes at most
_WATCHED = "job_memory" in inspect.signature(ProcessBackend.__init__).parameters
_LINGER = 5.0  # seconds that processes may outlive the master
_STUCK = 120.0  # seconds without any job that starts

#: What a job may do, how often among those that misbehave, and how its record ends.
_FAULTS = {
    "exit": (4, "CRASH"),
    "sigkill": (4, "CRASH"),
    "segfault": (4, "CRASH"),
    "raise": (4, "EXCEPTION"),
    "hang": (2, "TIMEOUT"),
    "deaf": (1, "TIMEOUT"),  # and it ignores SIGTERM
    "balloon": (2, "MEMORY" if _WATCHED else "EXCEPTION"),
}


def work(job: RunningJob) -> int:
    """One job. It writes down that it started and that it ended, around what it was made for."""
    _note("EVALKIT_SOAK_STARTS", job)
    match job["kind"]:
        case "exit":
            os._exit(3)
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "raise":
            raise RuntimeError("this one raises")
        case "hang":
            time.sleep(1e6)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1e6)
        case "balloon":
            _inflate((_MEMORY if _WATCHED else 0) + _BALLOON)
        case _:
            time.sleep(job["seconds"])
    _note("EVALKIT_SOAK_ENDS", job)
    return int(job["index"])


def _note(variable: str, job: RunningJob) -> None:
    with open(os.environ[variable], "a", encoding="ascii") as file:
        file.write(f"{job['index']}\n")


def _inflate(megabytes: int) -> None:
    taken = [b"\1" * (10 << 20) for _ in range(0, megabytes, 10)]
    if _WATCHED:
        time.sleep(1e6)
    raise MemoryError(f"nobody minded {len(taken) * 10} MB")


@dataclass
class Session:
    """One run of the master, up to its kill or its end."""

    jobs: int = 0
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)  # bytes
    descriptors: list[int] = field(default_factory=list)
    children: int = 0

    @property
    def grown(self) -> float:
        """Bytes of memory a job, after the first third of its samples, in which the interpreter warms up."""
        warm = self.memory[len(self.memory) // 3 :]
        return (warm[-1] - warm[0]) / max(1, self.jobs) if warm else 0.0

    @property
    def leaked(self) -> int:
        """By how many descriptors the least of the last samples is above the most of the first."""
        third = len(self.descriptors) // 3
        if not third:
            return 0
        return max(0, min(self.descriptors[-third:]) - max(self.descriptors[:third]))


class Soak:
    """One soak, in a folder of its own."""

    def __init__(self, folder: Path, jobs: int, kills: int, workers: int, seed: int) -> None:
        self.jobs, self.kills, self.workers = jobs, kills, workers
        self.rng = random.Random(seed)
        self.url = f"sqlite:///{folder / 'soak.db'}"
        self.parameters = folder / "parameters.csv"
        self.log = folder / "soak.log"
        self.starts = folder / "starts.txt"
        self.ends = folder / "ends.txt"
        self.starts.touch()
        self.ends.touch()
        self.problems: list[str] = []
        self.settled: dict[str, tuple[Any, ...]] = {}
        self.sessions: list[Session] = []
        self.lingered = 0.0
        self.kinds: list[str] = []
        self._write_parameters()

    def run(self) -> None:
        """Kill and resume, then let it end, then look at what there is."""
        # All kills fall into the first half, so that the last session is long enough to show what grows.
        points = sorted(self.rng.sample(range(1, max(self.kills + 1, self.jobs // 2)), self.kills))
        for point in points:
            self._session(point)
            self._compare_with_before()
        self._session(None)
        self._compare_with_before()
        self._check_records()
        self._check_sessions()

    def _write_parameters(self) -> None:
        names, weights = list(_FAULTS), [weight for weight, _ in _FAULTS.values()]
        with self.parameters.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["index", "kind", "seconds"])
            for index in range(self.jobs):
                kind = self.rng.choices(names, weights)[0] if self.rng.random() < 1 / _ONE_IN else "work"
                self.kinds.append(kind)
                table.writerow([index, kind, round(self.rng.uniform(0.01, 0.02), 4)])

    # -- sessions -------------------------------------------------------------------------------------------------

    def _session(self, point: int | None) -> None:
        """Run the master until so many jobs have started in all, then kill it; None lets it end."""
        target = f"{Path(__file__).resolve()}:work"
        command = [sys.executable, "-m", "evalkit", "run", target, "--params", str(self.parameters)]
        command += ["--workers", str(self.workers), "--job-timeout", str(_JOB_TIMEOUT), "--quiet"]
        command += ["--storage", self.url, "--search", _SEARCH, "--resume"]
        if _WATCHED:
            command += ["--option", f"job_memory={_MEMORY}MB"]
        session = Session()
        self.sessions.append(session)
        first, started = self._started(), time.monotonic()
        with self.log.open("a") as log:
            notes = {"EVALKIT_SOAK_STARTS": str(self.starts), "EVALKIT_SOAK_ENDS": str(self.ends)}
            master = psutil.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | notes)
            family = self._watch(master, session, first, point)
            if point is not None and master.poll() is None:
                family += [child for child in _children(master) if child not in family]
                master.kill()
            code = master.wait(_STUCK)
        session.seconds = time.monotonic() - started
        session.jobs = self._started() - first
        if point is None and code not in (0, 1):
            self.problems.append(f"the last run ended with {code}: {self.log.read_text()[-500:]}")
        elif point is not None and code != -signal.SIGKILL:
            self.problems.append(f"a run ended with {code} before it was killed: {self.log.read_text()[-500:]}")
        self._bury(family)

    def _watch(self, master: psutil.Popen, session: Session, first: int, point: int | None) -> list[psutil.Process]:
        """Sample the master until it is to be killed or ends; every process it had."""
        family: dict[psutil.Process, None] = {}
        sampled, moved, last = 0.0, time.monotonic(), first
        while master.poll() is None:
            now, started = time.monotonic(), self._started()
            if started != last:
                moved, last = now, started
            if point is not None and started >= max(point, first + 1):
                break
            if now - moved > _STUCK:
                self.problems.append(f"no job started for {_STUCK:g} s after {started} starts")
                master.kill()
                break
            if now - sampled > 0.25:
                sampled = now
                children = _children(master)
                family |= dict.fromkeys(children)
                try:
                    if started > first:
                        session.memory.append(master.memory_info().rss)
                        session.descriptors.append(master.num_fds())
                        session.children = max(session.children, len(children))
                except psutil.Error:
                    break
            time.sleep(0.005)
        return list(family)

    def _bury(self, family: Sequence[psutil.Process]) -> None:
        """Wait until all of a run's processes are gone."""
        began = time.monotonic()
        _, alive = psutil.wait_procs(list(family), timeout=_LINGER)
        self.lingered = max(self.lingered, time.monotonic() - began)
        for process in alive:
            self.problems.append(f"a process outlived its master by {_LINGER:g} s: {process}")
            process.kill()

    def _started(self) -> int:
        return self.starts.read_bytes().count(b"\n")

    # -- what is to hold ------------------------------------------------------------------------------------------

    def _records(self) -> Iterator[JobRecord]:
        storage: Storage = plugins().open_storage(self.url)
        try:
            gone = superseded(storage, storage.load_search(_SEARCH))
            yield from (record for record in iterate(storage, _SEARCH) if record.id not in gone)
        finally:
            storage.close()

    def _compare_with_before(self) -> None:
        now = {
            record.id: (record.state, record.cause, record.output, record.version)
            for record in self._records()
            if is_settled(record)
        }
        lost = [job_id for job_id, end in self.settled.items() if now.get(job_id) != end]
        if lost:
            self.problems.append(f"{len(lost)} stored ends were lost or changed, such as {lost[0]}")
        self.settled = now

    def _check_records(self) -> None:
        ends: Counter[int] = Counter()
        wrong: list[str] = []
        for record in self._records():
            index = record.args["index"]
            ends[index] += 1
            cause = _FAULTS[self.kinds[index]][1] if self.kinds[index] in _FAULTS else None
            expected = ("FAILED", cause, None) if cause else ("DONE", None, index)
            if (record.state, record.cause, record.output) != expected:
                wrong.append(f"{index} ({self.kinds[index]}): {record.state} {record.cause} {record.error}")
        missing = [index for index in range(self.jobs) if not ends[index]]
        twice = [index for index, n in ends.items() if n > 1]
        for what, found in (("without a record", missing), ("with two records", twice), ("with a wrong end", wrong)):
            if found:
                self.problems.append(f"{len(found)} configurations {what}, such as {found[0]}")

    @property
    def interrupted(self) -> int:
        """How many runs were of a configuration that had started before, and had not ended."""
        return _repeated(self.starts) - self.unwritten

    @property
    def unwritten(self) -> int:
        """How many were of one that had ended: the kill came before its record was written."""
        return _repeated(self.ends)

    def _check_sessions(self) -> None:
        again = self.interrupted + self.unwritten
        if again > self.kills * self.workers:
            self.problems.append(f"{again} jobs ran again: more than {self.workers} a kill")
        last = self.sessions[-1]
        if last.grown * self.jobs > max(4096 * self.jobs, 16e6):  # caches fill in any case
            self.problems.append(f"the master's memory grew by {last.grown:,.0f} bytes a job")
        if last.leaked > 4:
            self.problems.append(f"the master's descriptors grew by {last.leaked}")

    def report(self) -> None:
        last = self.sessions[-1]
        faults = Counter(kind for kind in self.kinds if kind in _FAULTS)
        rows = [
            ("jobs", f"{self.jobs:,}", ", ".join(f"{n} {kind}" for kind, n in sorted(faults.items()))),
            ("sessions", str(len(self.sessions)), f"{self.kills} of them killed"),
            ("seconds", f"{sum(session.seconds for session in self.sessions):.0f}", ""),
            ("run again", str(self.interrupted + self.unwritten), f"at most {self.kills * self.workers}"),
            ("  of which had ended", str(self.unwritten), ""),
            ("memory", f"{last.grown:,.0f} B a job", f"{max(last.memory, default=0) / 1e6:.0f} MB at most"),
            ("descriptors", f"+{last.leaked}", f"{max(last.descriptors, default=0)} at most"),
            ("processes", f"{max(session.children for session in self.sessions)} at most", "beneath the master"),
            ("gone after", f"{self.lingered:.2f} s", f"at most {_LINGER:g} s"),
            ("problems", str(len(self.problems)), ""),
        ]
        print_table("What the soak found", ("what", "found", "to compare with"), rows)
        for problem in self.problems:
            print(f"- {problem}")


def _repeated(notes: Path) -> int:
    return sum(n - 1 for n in Counter(notes.read_text().split()).values())


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; 0 if everything holds, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="evalkit-soak-") as folder:
        soak = Soak(Path(folder), options.jobs, options.kills, options.workers, options.seed)
        soak.run()
        soak.report()
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
