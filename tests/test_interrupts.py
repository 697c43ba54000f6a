"""Ctrl-C and other ends of a program that uses an Evaluator: real processes, wherever they are at that moment."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from evalkit.states import TERMINAL_STATES, JobState
from evalkit.storage import SQLStorage

#: Job 1 ends, and jobs 2 and 3 run until they are asked to stop. The program says when it is at the place to break it.
PROGRAM = """
import gc, os, pathlib, sys, time
gc.disable()  # Python itself drops a signal that comes while the collector calls back
from evalkit import Callback, Evaluator

backend, place, grace = sys.argv[1], sys.argv[2], float(sys.argv[3])

def here():
    print("here", flush=True)

def run(job):
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    while job["x"] > 1 and (grace > 10 or not job.stopped()):
        time.sleep(0.01)
        if job.stopped():
            open("asked", "w").close()
    return job["x"]

def endless():
    yield {"x": 2}
    here()
    while True:
        time.sleep(0.01)

def wait_until_both_run():
    while backend != "serial" and pathlib.Path("pids").read_text().count("\\n") < 3:
        time.sleep(0.01)

class Slow(Callback):
    def on_done(self, job):
        if place == "callback" and job.args["x"] == 1:
            here()
            time.sleep(1.0)

options = {"num_workers": 2, "storage": "sqlite:///study.db", "callbacks": [Slow()], "grace": grace}
with Evaluator.create(run, backend, options) as evaluator:
    evaluator.submit([{"x": 1}])
    print("gathered", [job.id for job in evaluator.gather("ALL")], flush=True)
    if place == "submit":
        evaluator.submit(endless())
    evaluator.submit([{"x": 2}, {"x": 3}])
    if place == "gather":
        wait_until_both_run()
        here()
        evaluator.gather("BATCH")
    if place == "close":
        wait_until_both_run()
"""


class Program:
    """The program in a folder of its own, as a process of its own."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)
        command = [sys.executable, "-W", "error", "program.py", *args]
        path = {"PYTHONPATH": str(Path(__file__).parents[1])}
        self.process = subprocess.Popen(
            command, cwd=folder, env=os.environ | path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        if args[1] == "close":
            wait_until((folder / "asked").exists)
            return
        for line in self.process.stdout:
            if line == "here\n":
                return
        pytest.fail(f"it did not get there: {self.process.communicate()[1]}")

    def end(self) -> str:
        """What it wrote to standard error by its end, which comes soon, and leaves no process."""
        children = self.pids()
        _, err = self.process.communicate(timeout=300)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in children), 5.0)
        return err

    def pids(self) -> set[int]:
        found = {int(line) for line in (self.folder / "pids").read_text().split()}
        with contextlib.suppress(psutil.Error):
            found |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        return found

    def states(self) -> list[JobState]:
        with contextlib.closing(SQLStorage(f"sqlite:///{self.folder}/study.db")) as storage:
            return [record.state for record in storage.load_jobs(storage.list_searches()[0])]


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("place", "backend"),
    [
        *itertools.product(["gather", "submit", "callback"], ["process", "thread", "serial"]),
        ("close", "process"),
        ("close", "thread"),  # on serial nothing runs in close
    ],
)
def test_ctrl_c(tmp_path: Path, backend: str, place: str) -> None:
    program = Program(tmp_path, backend, place, "100" if place == "close" else "0.5")
    program.process.send_signal(signal.SIGINT)
    err = program.end()
    # As any Python program: one traceback, of the user's own line; nothing from how the interpreter ends.
    assert program.process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt"), err
    assert err.count("Traceback") == 1, err
    assert "ignored" not in err, err
    states = program.states()
    assert states[0] is JobState.DONE
    assert set(states) <= TERMINAL_STATES, states


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_ctrl_c_twice_does_not_wait_for_the_grace(tmp_path: Path, backend: str) -> None:
    program = Program(tmp_path, backend, "gather", "100")
    program.process.send_signal(signal.SIGINT)
    wait_until((tmp_path / "asked").exists)  # it closes by now
    program.process.send_signal(signal.SIGINT)
    err = program.end()
    assert "ignored" not in err, err
    assert program.states()[0] is JobState.DONE


@pytest.mark.parametrize("backend", ["process", "thread", "serial"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_program_leaves_no_process(tmp_path: Path, backend: str, number: signal.Signals) -> None:
    program = Program(tmp_path, backend, "gather", "100")
    program.process.send_signal(number)
    assert program.end() == ""
    assert program.process.returncode == -number
    assert program.states()[0] is JobState.DONE


INTERRUPT_AT = """
import signal, sys
from evalkit import Callback, Evaluator
from evalkit.storage import MemoryStorage, SQLStorage

def interrupt_at(number):
    # Python looks for signals where a function begins, and where one written in C has returned.
    seen = 0
    def watch(frame, event, arg):
        nonlocal seen
        path = frame.f_code.co_filename
        if event in ("call", "c_return") and ("/evalkit/" in path or path.endswith("/threading.py")):
            seen += 1
            if seen == number:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)
    return watch
"""

SWEEP_OF_CLOSE = """
def run(job):
    while job["x"] and not job.stopped():
        pass

storage = SQLStorage("sqlite:///study.db")
number = interrupted = 0
while True:
    number += 1
    evaluator = Evaluator.create(run, sys.argv[1], {"storage": storage, "grace": 30.0})
    evaluator.submit([{"x": 0}, {"x": 1}, {"x": 2}, {"x": 3}])
    sys.setprofile(interrupt_at(number))
    try:
        evaluator.close()
        sys.setprofile(None)
        break
    except KeyboardInterrupt:
        sys.setprofile(None)
        interrupted += 1
    evaluator.close()  # as the interpreter does when it ends, if that has not happened
    states = {record.state.value for record in storage.load_jobs(evaluator.search_id)}
    assert states <= {"DONE", "CANCELLED"}, (number, states)
assert interrupted == number - 1
print(interrupted)
"""


SWEEP_OF_GATHER = """
what = sys.argv[3]

def run(job):
    return job["x"]

def talk(job):
    job.report(0.5)
    job.record(a=1)
    if job["x"] == 0 and others:
        others[-1].cancel()
    return job["x"]

storage = SQLStorage("sqlite:///study.db") if sys.argv[2] == "sqlite" else MemoryStorage()
number = interrupted = 0
while True:
    number += 7 if sys.argv[1] == "process" else 1  # it takes a while to start
    callbacks = [Callback()] if what == "callbacks" else []
    with Evaluator.create(
        talk if what == "talk" else run,
        sys.argv[1],
        {"storage": storage, "num_workers": 2, "callbacks": callbacks},
    ) as evaluator:
        jobs = others = []
        sys.setprofile(interrupt_at(number))
        try:
            others = evaluator.submit([{"x": 0}, {"x": 1}, {"x": 2}, {"x": 3}])
            jobs = evaluator.gather("BATCH", 2)
            jobs += evaluator.gather("ALL")
            sys.setprofile(None)
            break
        except KeyboardInterrupt:
            sys.setprofile(None)
            interrupted += 1
        # A batch that was returned before is with us; all else is still to be had.
        returned = [job.id for job in jobs + evaluator.gather("ALL")]
        records = storage.load_jobs(evaluator.search_id)
        assert sorted(returned) == sorted(record.id for record in records), (number, returned, records)
        assert len(records) in (0, 4)
        ended = {record.state.value for record in records}
        # On serial, Ctrl-C ends the job that runs.
        assert ended <= ({"DONE", "CANCELLED"} if sys.argv[1] == "serial" else {"DONE"}), (number, ended)
        assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered == len(returned)
print(interrupted)
"""


SWEEP_OF_READS = """
from evalkit import Job, JobState

number, interrupted = 0, True
while interrupted:
    number += 1
    storage = MemoryStorage()
    search = storage.create_search()
    ids = [job for _ in range(3) for job in storage.create_jobs(search, [{"x": 1}] * 2)]
    ended = Job(ids[1], {"x": 1})
    ended.move(JobState.RUNNING)
    ended.finish(JobState.DONE, 7)
    storage.end_jobs([ended])
    sys.setprofile(interrupt_at(number))
    try:
        storage.count_jobs(search)
        sys.setprofile(None)
        interrupted = False
    except KeyboardInterrupt:
        sys.setprofile(None)
    ids += storage.create_jobs(search, [{"x": 2}])
    records = storage.load_jobs(search)
    assert [record.id for record in records] == ids, number
    assert [record.output for record in records] == [None, 7, None, None, None, None, None], number
    assert storage.count_jobs(search) == {JobState.QUEUED: 6, JobState.DONE: 1}, number
    assert {record.id for record in storage.changes(search)[0]} == set(ids), number
    assert [record.id for record in storage.claim_jobs(search, 9, "me", 60.0)] == [ids[0], *ids[2:]], number
print(number)
"""


@pytest.mark.parametrize(
    ("sweep", "backend", "storage", "what"),
    [
        *((SWEEP_OF_CLOSE, backend, "sqlite", "") for backend in ("serial", "thread")),
        *((SWEEP_OF_GATHER, backend, "sqlite", "") for backend in ("serial", "thread")),
        *((SWEEP_OF_GATHER, backend, "memory", "callbacks") for backend in ("serial", "thread")),
        (SWEEP_OF_GATHER, "serial", "memory", "talk"),
        (SWEEP_OF_GATHER, "process", "memory", ""),
        (SWEEP_OF_READS, "", "memory", ""),
    ],
)
def test_wherever_ctrl_c_comes_nothing_is_torn(
    tmp_path: Path, sweep: str, backend: str, storage: str, what: str
) -> None:
    (tmp_path / "program.py").write_text(INTERRUPT_AT + sweep)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", "program.py", backend, storage, what]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, timeout=300, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


ALARMS = """
import random, signal, time
from evalkit import Evaluator

class TooLong(Exception):
    pass

def ring(number, frame):
    raise TooLong

def run(job):
    time.sleep(job["seconds"])
    return 1

signal.signal(signal.SIGALRM, ring)
chance = random.Random(5)
heard = 0
with Evaluator.create(run, "process", {"num_workers": 2}) as evaluator:
    evaluator.submit([{"seconds": 0.0}] * 500)  # jobs are known to be short
    evaluator.gather("ALL")
    for _ in range(30):
        jobs = evaluator.submit([{"seconds": 0.001}, {"seconds": 0.001}, {"seconds": 0.03}])
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.01 * chance.random())
            evaluator.gather("ALL")
        except TooLong:
            heard += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        evaluator.gather("ALL")
        assert [job.output for job in jobs] == [1, 1, 1], [job.error for job in jobs]
print(heard)
"""


def test_an_alarm_ends_a_gather_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(ALARMS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", "program.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, timeout=300, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


DROPPED = """
from evalkit import Evaluator

def run(job):
    while not job.stopped():
        pass

def main():
    Evaluator.create(run, "thread", {"storage": "sqlite:///study.db", "grace": 5.0}).submit([{"x": 1}, {"x": 2}])

main()
"""


def test_an_evaluator_that_nobody_holds_or_closes_is_closed_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(DROPPED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, timeout=300, check=True)
    with contextlib.closing(SQLStorage(f"sqlite:///{tmp_path}/study.db")) as storage:
        records = storage.load_jobs(storage.list_searches()[0])
    assert [record.state for record in records] == [JobState.CANCELLED, JobState.CANCELLED]
