"""Results that wait in a worker for others: they are not lost with it, and no job holds them up."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import math
import os
import pickle
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from process_fixtures import FakeTask, Make, gather

from evalkit import JobCause, JobState, RunningJob
from evalkit.backends.process.link import WorkerLink
from evalkit.backends.process.outbox import SMALL, TOGETHER, Outbox, OutboxReader
from evalkit.backends.process.wire import (
    NUMBER_BYTES,
    NUMBERS,
    FrameReader,
    Kind,
    frame,
    is_number,
    number_into,
    small_frame,
)
from evalkit.backends.process.worker import _Worker
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, in_background

_MEASURED = (1.0, 2.0, 0.5, 1000)


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
        jobs = evaluator.submit([{"x": x, "how": how if x % 100 == 99 else "", "log": str(log)} for x in range(1000)])
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
    return _OUTPUTS[job["what"]] if "what" in job else job["x"]


_OUTPUTS = {"an int": 1, "a huge int": 2**64, "a float": 0.5, "None": None, "a text": "x" * 3000, "a tuple": (1, 2)}


@pytest.mark.parametrize(("how", "what"), [("sleeps in C", "an int"), *(("waits", what) for what in _OUTPUTS)])
def test_a_long_job_does_not_hold_up_the_results_before_it(make: Make, files: Files, how: str, what: str) -> None:
    evaluator = make(_tiny_or_long, num_workers=1)
    for n in range(20):
        tiny = evaluator.submit([{"x": x, "what": what} for x in range(30 + 5 * n)])
        (long,) = evaluator.submit([files.holder(str(n), x=-1, how=how)])
        gathered: list[object] = []
        while len(gathered) < len(tiny):
            gathered += gather(evaluator, "BATCH", len(tiny) - len(gathered))
        assert gathered == tiny
        files.release(str(n))
        assert gather(evaluator) == [long]


class _Slow:
    """Takes its time to be pickled."""

    def __reduce__(self) -> Any:
        time.sleep(0.02)
        return int, (7,)


def _packed_slowly(job: RunningJob) -> Any:
    return _Slow() if job["x"] == "slow" else _tiny_or_long(job)


def test_a_result_that_takes_long_to_pack_is_not_held_up_either(make: Make, files: Files) -> None:
    evaluator = make(_packed_slowly, num_workers=1)
    evaluator.submit([{"x": x} for x in range(2000)])
    gather(evaluator)
    jobs = evaluator.submit([{"x": 0}] * 5 + [{"x": "slow"}, files.holder("a", x=-1, how="waits"), {"x": 0}])
    eventually(lambda: jobs[5].is_complete, "the result before that of the job that waits")
    assert jobs[5].output == 7
    files.release("a")
    assert gather(evaluator) == jobs


def _talks(job: RunningJob) -> int:
    n = 0
    if job["x"] == "talks":
        while not job.stopped():
            job.record(n=n)
            n += 1
    return n


def test_a_job_that_never_stops_talking_can_be_cancelled(make: Make) -> None:
    evaluator = make(_talks, num_workers=1)
    evaluator.submit([{"x": x} for x in range(2000)])
    gather(evaluator)
    (talker, *others) = evaluator.submit([{"x": "talks"}, {"x": 0}, {"x": 0}])
    eventually(lambda: len(talker.records) > 1000, "what it says")
    in_background(talker.cancel).result(BOUND)
    gather(evaluator)
    assert talker.state is JobState.CANCELLED
    assert all(job.is_success for job in others)


class _Evil:
    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("not here")


def _records_evil(job: RunningJob) -> int:
    if job["x"] == "evil":
        evil = _Evil()
        evil.x = 1  # type: ignore[attr-defined]
        job.record(evil=evil)
    return 1


def test_a_record_that_cannot_be_rebuilt_costs_nothing_else(make: Make) -> None:
    evaluator = make(_records_evil, num_workers=1)
    evaluator.submit([{"x": x} for x in range(2000)])
    gather(evaluator)
    jobs = evaluator.submit([{"x": "evil" if x % 8 == 7 else x} for x in range(80)])
    assert gather(evaluator) == jobs
    assert {job.state for job in jobs} == {JobState.DONE}
    assert "not here" in jobs[7].records[0]["evalkit_error"]
    assert not any(job.records for job in jobs if job.args["x"] != "evil")


def _prints_or_not(job: RunningJob) -> None:
    if job["x"] == "prints":
        print("by the next")
        time.sleep(0.02)


def test_the_log_of_a_job_has_nothing_of_the_next(make: Make) -> None:
    evaluator = make(_prints_or_not, num_workers=1)
    for _ in range(20):
        evaluator.submit([{"x": x} for x in range(600)])
        gather(evaluator)
        jobs = evaluator.submit([{"x": x} for x in range(6)] + [{"x": "prints"}, {"x": 0}])
        while not jobs[5].is_complete:
            assert [job.log for job in jobs[:6]] == [""] * 6
        gather(evaluator)
        assert [job.log for job in jobs] == [""] * 6 + ["by the next\n", ""]


class _TooLong(Exception):
    pass


def _too_long(*_: object) -> None:
    raise _TooLong


def _limits_itself(job: RunningJob) -> int:
    """As many functions do: an alarm that raises, wherever the function is just then."""
    if job["us"]:
        signal.signal(signal.SIGALRM, _too_long)
        with contextlib.suppress(_TooLong):
            try:
                signal.setitimer(signal.ITIMER_REAL, job["us"] * 1e-6)
                job.record(a=1)
                time.sleep(0.001)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    return job["x"]


def test_an_exception_from_a_signal_handler_mixes_nothing_up(make: Make) -> None:
    evaluator = make(_limits_itself, num_workers=1)
    rng = random.Random(0)
    for _ in range(60):
        jobs = evaluator.submit([{"x": x, "us": rng.uniform(5, 60) if x % 6 == 5 else 0} for x in range(120)])
        assert gather(evaluator) == jobs
        assert [job.output for job in jobs] == list(range(120))


def test_messages_that_come_twice_or_not_at_all() -> None:
    link = WorkerLink(0)

    def heard(*numbers: int) -> list[int]:
        link.their_sock.sendall(b"".join(small_frame(Kind.DONE, b"", number % NUMBERS) for number in numbers))
        return [number for _, number, _, _ in link.read()]

    try:
        assert heard(0, 1, 2) == [0, 1, 2]
        assert heard(1, 2, 3) == [3]
        assert heard(4, 4, 6) == [4, 6]
        assert heard(7, 6, 9, 8) == [7, 9]
        for first in range(10, NUMBERS + 1000, 1000):
            assert heard(*range(first, first + 1000)) == [number % NUMBERS for number in range(first, first + 1000)]
            assert heard(first + 998, first + 999) == []
    finally:
        link.close()


def test_a_token_from_before_two_drops_that_come_at_once() -> None:
    link = WorkerLink(0)
    worker = _Worker(link.their_sock, link.fds_for_worker[1], Outbox(os.dup(link.fds_for_worker[2])))

    def begin() -> str | None:
        task = worker._next()
        return None if task is None else task[0]

    read, write = os.pipe()
    try:
        link.give([FakeTask("a"), FakeTask("b")])
        worker._receive()
        assert begin() == "a"
        assert [task.id for task in link.take_back()] == ["b"]
        link.give([FakeTask("c"), FakeTask("d")])
        os.write(write, os.read(link.fds_for_worker[1], 1))  # the worker takes a token, and is slow to go on
        assert [task.id for task in link.take_back()] == ["d"]
        worker._tokens = read
        assert in_background(begin).result(BOUND) == "c"
    finally:
        os.close(read)
        os.close(write)
        link.close()


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

    def seen() -> list[int]:
        return [pickle.loads(payload) for _, _, payload, _ in reader.read()]

    assert seen() == []
    outbox.put(result(1))
    outbox.put(result(2))
    assert (seen(), outbox.held) == ([1, 2], 2)
    assert outbox.contents() == result(1) + result(2)
    outbox.clear()
    assert (seen(), outbox.held) == ([], 0)
    outbox.put(result(3))
    assert seen() == [3]


def test_an_outbox_takes_as_many_results_as_may_wait(ends: tuple[Outbox, OutboxReader]) -> None:
    outbox, reader = ends
    for number in range(TOGETHER):
        outbox.put(small_frame(Kind.DONE, bytes(SMALL - 1), number))
    outbox.put_number(1, _MEASURED, TOGETHER)
    assert [number for _, number, _, _ in reader.read()] == list(range(TOGETHER + 1))


def test_numbers_in_an_outbox(ends: tuple[Outbox, OutboxReader]) -> None:
    outbox, reader = ends
    assert list(map(is_number, [0, -(2**63), 2**63 - 1, 2**63, -(2**63) - 1, True, None, 0.5, math.nan, "1"])) == (
        [True, True, True, False, False, False, False, True, True, False]
    )
    outbox.put_number(-(2**63), _MEASURED, 1)
    outbox.put(small_frame(Kind.DONE, b"between", 2))
    outbox.put_number(-0.0, _MEASURED, 3)
    assert repr([payload for _, _, payload, _ in reader.read()]) == repr(
        [(-(2**63), _MEASURED), b"between", (-0.0, _MEASURED)]
    )


@pytest.mark.parametrize("seed", range(30))
def test_results_come_out_as_they_went_in_whatever_the_pieces(seed: int) -> None:
    rng = random.Random(seed)
    sent: list[tuple[int, int, Any, tuple[Any, ...]]] = []
    stream = bytearray()
    memory = bytearray(100)
    kinds = rng.choice([["float"], ["int"], ["float", "int", "other", "arrays"], ["float", "other"]])
    for tag in range(rng.randrange(1, 300)):
        kind = rng.choice(kinds)
        if kind in ("float", "int"):
            value = rng.uniform(-1, 1) if kind == "float" else rng.randrange(-(2**63), 2**63)
            measured = (rng.random(), rng.random(), rng.random(), rng.randrange(2**63))
            number_into(memory, 7, value, measured, tag)
            stream += memory[7 : 7 + NUMBER_BYTES]
            sent.append((Kind.DONE, tag, (value, measured), ()))
            continue
        payload = rng.randbytes(rng.choice([0, 1, 40, 5000, 300_000 if tag % 50 == 0 else 2]))
        buffers = [memoryview(rng.randbytes(rng.randrange(5000))) for _ in range(rng.randrange(3) * (kind == "arrays"))]
        stream += b"".join(frame(Kind.DONE, payload, buffers, tag))
        sent.append((Kind.DONE, tag, payload, tuple(bytes(buffer) for buffer in buffers)))
    ours, theirs = socket.socketpair()
    reader = FrameReader(ours)
    read: list[tuple[int, int, Any, tuple[Any, ...]]] = []
    size = rng.choice([3, 56, 1000, 100_000])
    with ours, theirs:
        for start in range(0, len(stream), size):
            theirs.sendall(stream[start : start + size])
            with contextlib.suppress(BlockingIOError):
                while True:
                    read += reader.read(socket.MSG_DONTWAIT)
    plain = [
        (kind, tag, payload if type(payload) is tuple else bytes(payload), tuple(map(bytes, buffers)))
        for kind, tag, payload, buffers in read
    ]
    assert plain == sent


class _MyFloat(float):
    """Equal to a float, and not one."""


_NUMBERS = [0.0, -0.0, 1e-320, math.inf, -math.inf, math.nan, 0, -1, 2**63 - 1, -(2**63), 2**63, 10**40, True, None]


def _number(job: RunningJob) -> Any:
    number = _NUMBERS[job["x"] % len(_NUMBERS)]
    return _MyFloat(number) if job["mine"] else number


def test_numbers_keep_their_type_and_each_bit(make: Make) -> None:
    evaluator = make(_number, num_workers=1)
    evaluator.submit([{"x": x, "mine": False} for x in range(10 * len(_NUMBERS))])
    evaluator.submit([{"x": 6, "mine": True}])
    *jobs, mine = gather(evaluator)
    assert list(map(repr, [job.output for job in jobs])) == 10 * list(map(repr, _NUMBERS))
    assert type(mine.output) is _MyFloat
    for job in jobs:
        measured = job.measured
        assert measured.timestamp_end >= measured.timestamp_start >= measured.timestamp_submit
        assert measured.cpu_time >= 0
        assert measured.peak_rss > 1_000_000
