"""What goes over the one connection of a worker while it runs: what jobs say, requests to stop, and the next chunk."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evalkit import Evaluator, JobCause, JobState
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, gathering, in_background
from evalkit_loky.connection import Connection, Kind
from evalkit_loky.worker_end import WorkerEnd

Make = Callable[..., Evaluator]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Evaluator] = []

    def make(function: Callable[..., Any], **kwargs: Any) -> Evaluator:
        made.append(Evaluator.create(function, "loky", {"num_workers": 1, "grace": 0.2, **kwargs}))
        return made[-1]

    yield make
    for evaluator in made:
        evaluator.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    files.release_all()


@pytest.fixture
def ends() -> Iterator[tuple[Connection, WorkerEnd]]:
    """Both ends, in this process."""
    connection, worker_end = Connection(), WorkerEnd()
    worker_end.open(connection.theirs)
    yield connection, worker_end
    connection.close()
    connection.theirs.close()


def record_and_die(job: Any) -> None:
    for step in range(500):
        job.record(step=step, data=bytes(2000))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_worker_said_before_it_died_is_kept(make: Make) -> None:
    evaluator = make(record_and_die)
    (job,) = evaluator.submit([{}])
    in_background(evaluator.gather, "ALL").result(BOUND)
    assert job.cause is JobCause.CRASH
    assert [record["step"] for record in job.records] == list(range(500))


def test_many_records_and_large_arguments_pass_each_other(make: Make) -> None:
    """Neither end waits for the other to read while it sends."""

    def run(job: Any) -> int:
        for _ in range(20):
            job.record(data=bytes(2**20))
        return len(job["x"])

    evaluator = make(run)
    evaluator.submit([{"x": bytes(30 * 2**20)}] * 4)
    jobs = in_background(evaluator.gather, "ALL").result(BOUND)
    assert [(job.output, len(job.records)) for job in jobs] == [(30 * 2**20, 20)] * 4


def test_any_thread_of_a_job_hears_that_it_is_to_stop(make: Make, files: Files) -> None:
    def run(job: Any) -> int:
        heard: list[int] = []

        def listen() -> None:
            while not job.stopped():
                time.sleep(0.001)
            heard.append(1)

        threads = [threading.Thread(target=listen) for _ in range(8)]
        for thread in threads:
            thread.start()
        Path(job["started"]).touch()
        for thread in threads:
            thread.join(BOUND)
        return len(heard)

    evaluator = make(run, grace=BOUND)
    (job,) = evaluator.submit([{"started": files["started"]}])
    with gathering(evaluator):
        files.wait("started")
        job.cancel()
    assert (job.state, job.output) == (JobState.CANCELLED, 8)


def test_a_fork_of_a_worker_neither_reads_nor_sends(make: Make, files: Files) -> None:
    def run(job: Any) -> bool:
        child = os.fork()
        if child == 0:
            try:
                job.record(step="of the child")
                while not os.path.exists(job["over"]):
                    job.stopped()
            finally:
                os._exit(0)
        Path(job["started"]).touch()
        while not job.stopped():
            time.sleep(0.001)
        Path(job["over"]).touch()
        os.waitpid(child, 0)
        job.record(step="of the worker")
        return True

    evaluator = make(run, grace=BOUND)
    (job,) = evaluator.submit([{"started": files["started"], "over": files["over"]}])
    with gathering(evaluator):
        files.wait("started")
        job.cancel()
        files.wait("over")
    assert [record["step"] for record in job.records] == ["of the worker"]


def test_a_program_that_does_not_run_for_a_while_holds_up_what_jobs_say_and_loses_nothing(tmp_path: Path) -> None:
    """The records are more than a socket holds, so the worker waits."""
    (tmp_path / "program.py").write_text(
        """
from pathlib import Path
from evalkit import Evaluator

def run(job):
    Path("started").touch()
    for step in range(2000):
        job.record(step=step, data=bytes(1000))
    return "done"

with Evaluator.create(run, "loky", {"num_workers": 1}) as evaluator:
    evaluator.submit([{}])
    (job,) = evaluator.gather("ALL")
    assert [record["step"] for record in job.records] == list(range(2000))
    assert job.output == "done"
"""
    )
    with subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path) as program:
        eventually(lambda: (tmp_path / "started").exists(), "the start of the job")
        program.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        program.send_signal(signal.SIGCONT)
        assert program.wait(BOUND) == 0


# -- the ends ---------------------------------------------------------------------------------------------------------


def test_a_chunk_that_comes_with_a_request_is_kept(ends: tuple[Connection, WorkerEnd]) -> None:
    connection, worker_end = ends
    connection.send(Kind.CHUNK, b"first")
    assert worker_end.next_chunk() == b"first"
    connection.send(Kind.CHUNK, bytes(2**17))
    connection.send(Kind.STOP, (7).to_bytes(8, "little"))
    eventually(lambda: worker_end.stop_requested(7), "the request")
    assert not worker_end.stop_requested(8)
    assert worker_end.next_chunk() == bytes(2**17)
    assert worker_end.stop_requested(7), "it may be for the chunk that came before it"


def test_messages_of_a_worker_arrive_in_order(ends: tuple[Connection, WorkerEnd]) -> None:
    connection, worker_end = ends
    sent = [(Kind.MESSAGE, b""), (Kind.MESSAGE, bytes(3 * 2**20)), (Kind.ANSWER, b"one"), (Kind.FAILURE, b"two")]

    def send() -> None:
        for kind, message in sent:
            worker_end.answer(kind, message)

    sending = in_background(send)
    assert [connection.receive() for _ in sent] == sent
    sending.result(BOUND)


def test_a_worker_hears_that_the_main_process_has_gone() -> None:
    ours, theirs = socket.socketpair()
    worker_end = WorkerEnd()
    worker_end.open(theirs)
    assert not worker_end.stop_requested(1)
    ours.close()
    eventually(lambda: worker_end.stop_requested(1), "the end")
    with pytest.raises(EOFError):
        worker_end.next_chunk()
    theirs.close()


def test_after_a_message_that_was_cut_off_nothing_is_sent(ends: tuple[Connection, WorkerEnd]) -> None:
    """The main process would take what follows for the rest of it."""
    _, worker_end = ends

    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(InterruptedError):
            worker_end.send(bytes(10 * 2**20))  # nobody reads
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ConnectionError, match="cut off"):
        worker_end.send(b"")


def test_without_a_connection_nothing_is_sent() -> None:
    with pytest.raises(ConnectionError):
        WorkerEnd().send(b"")
    assert not WorkerEnd().stop_requested(1)
