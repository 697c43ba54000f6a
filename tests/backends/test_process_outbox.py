"""Results that wait in a worker for others: they are not lost with it, and no job holds them up."""

from __future__ import annotations

import collections
import ctypes
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_fixtures import Make, gather

from evalkit import JobCause, JobState, RunningJob
from evalkit.backends.process.outbox import Outbox, OutboxReader
from evalkit.backends.process.wire import Kind, small_frame
from evalkit.testing.backend_fixtures import Files


def _tiny_or_not(job: RunningJob) -> int:
    """Tiny jobs, so that their results are held back; and some that are the end of their worker."""
    fd = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{job.id}\n".encode())
    os.close(fd)
    if job["how"] == "exit":
        os._exit(3)
    if job["how"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return job["x"]


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_what_a_worker_held_when_it_died_counts(make: Make, tmp_path: Path, how: str) -> None:
    evaluator = make(_tiny_or_not, num_workers=2)
    log = tmp_path / "log"
    for _ in range(3):
        jobs = evaluator.submit([{"x": x, "how": how if x % 50 == 49 else "", "log": str(log)} for x in range(1000)])
        assert gather(evaluator) == jobs
        for job in jobs:
            if job.args["how"]:
                assert (job.state, job.cause) == (JobState.FAILED, JobCause.CRASH)
            else:
                assert (job.state, job.output, job.attempt) == (JobState.DONE, job.args["x"], 0)
    runs = collections.Counter(log.read_text().split())
    assert len(runs) == 3000
    assert set(runs.values()) == {1}, "no job runs twice"


def _tiny_or_long(job: RunningJob) -> int:
    if job.get("how") == "sleeps in C":
        # With the lock of the interpreter: no other thread of the worker could do anything.
        release = job["release"].encode()
        access, usleep = ctypes.PyDLL(None).access, ctypes.PyDLL(None).usleep
        Path(job["started"]).touch()
        while access(release, os.F_OK):
            usleep(5000)
    elif job.get("how") == "waits":
        Path(job["started"]).touch()
        while not os.path.exists(job["release"]):
            os.sched_yield()
    return job["x"]


@pytest.mark.parametrize("how", ["waits", "sleeps in C"])
def test_a_long_job_does_not_hold_up_the_results_before_it(make: Make, files: Files, how: str) -> None:
    evaluator = make(_tiny_or_long, num_workers=1)
    for n in range(20):
        tiny = evaluator.submit([{"x": x} for x in range(30 + n)])
        (long,) = evaluator.submit([files.holder(str(n), x=-1, how=how)])
        gathered: list[object] = []
        while len(gathered) < len(tiny):
            gathered += gather(evaluator, "BATCH", len(tiny) - len(gathered))
        assert gathered == tiny
        files.release(str(n))
        assert gather(evaluator) == [long]


@pytest.fixture
def ends() -> Iterator[tuple[Outbox, OutboxReader]]:
    reader = OutboxReader()
    outbox = Outbox(os.dup(reader.fd))
    yield outbox, reader
    reader.close_theirs()
    reader.close()


def test_what_is_in_an_outbox(ends: tuple[Outbox, OutboxReader]) -> None:
    outbox, reader = ends

    def result(value: int) -> bytes:
        return small_frame(Kind.DONE, pickle.dumps(value, 5))

    def seen() -> tuple[int, list[int]]:
        before, frames = reader.read()
        return before, [pickle.loads(payload) for _, _, payload, _ in frames]

    assert seen() == (0, [])
    outbox.pass_by()
    outbox.put(result(1))
    outbox.put(result(2))
    assert (seen(), outbox.held) == ((1, [1, 2]), 2)
    assert outbox.contents() == result(1) + result(2)
    outbox.clear()
    assert (seen(), outbox.held) == ((3, []), 0)
    outbox.put(result(3))
    assert seen() == (3, [3])


def test_an_outbox_that_is_full_takes_nothing_more(ends: tuple[Outbox, OutboxReader]) -> None:
    outbox, reader = ends
    while outbox.put(small_frame(Kind.DONE, bytes(4000))):
        pass
    before, frames = reader.read()
    assert (before, len(frames)) == (0, outbox.held)
    assert 15 <= outbox.held <= 17
