"""The worker's side of an executor, and the socket that is its way back."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evalkit.backends.chunk import Program, Setup
from evalkit.backends.chunk_wire import Kind, Message, Outcome
from evalkit.backends.side_channel import SideChannelClient
from evalkit.backends.socket_channel import SocketChannel
from evalkit.testing.backend_fixtures import BOUND, eventually


class Heard(list[Any]):
    """What came over a channel."""


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def channel(heard: Heard) -> Iterator[SocketChannel]:
    channel = SocketChannel()
    channel.start(heard.append)
    yield channel
    channel.close()


def elsewhere(channel: SocketChannel) -> SideChannelClient:
    """The worker's end, as it arrives there."""
    client: SideChannelClient = pickle.loads(pickle.dumps(channel.client))
    return client


# -- the socket -------------------------------------------------------------------------------------------------------


def test_messages_arrive_whole_and_in_order(channel: SocketChannel, heard: Heard) -> None:
    client = elsewhere(channel)
    messages = [b"", b"one", bytes(5 * 2**20), *(b"%d" % i for i in range(200))]
    for message in messages:
        client.send(message)
    eventually(lambda: len(heard) == len(messages), "the messages")
    assert heard == messages
    client.close()


def folder_of(channel: SocketChannel) -> Path:
    (address,) = channel.client.__reduce__()[1]  # type: ignore[misc]
    return Path(address).parent


def test_only_this_user_can_enter_the_folder_of_the_socket(channel: SocketChannel) -> None:
    status = folder_of(channel).stat()
    assert (status.st_uid, oct(status.st_mode & 0o777)) == (os.geteuid(), "0o700")
    channel.close()
    assert not folder_of(channel).exists()


def test_a_temporary_folder_with_a_long_name_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    channel = SocketChannel()
    channel.start(heard.append)
    client = elsewhere(channel)
    client.send(b"word")
    eventually(lambda: heard == [b"word"], "a message")
    client.close()
    channel.close()
    assert not folder_of(channel).exists()


def test_a_fork_of_the_master_leaves_the_channel_to_it(channel: SocketChannel, heard: Heard) -> None:
    if (child := os.fork()) == 0:
        try:
            channel.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    client = elsewhere(channel)
    client.send(b"word")
    eventually(lambda: heard == [b"word"], "a message")
    client.close()


_KILLED = """
    import multiprocessing, os, signal, sys, time
    from concurrent.futures import ProcessPoolExecutor
    from pathlib import Path
    from evalkit import Evaluator
    from evalkit.backends import Capabilities, ExecutorBackend

    class Pool(ExecutorBackend):
        capabilities = Capabilities(isolates_crashes=True, by_value=True, streams=True)

        def make_executor(self):
            return ProcessPoolExecutor(self.num_workers, multiprocessing.get_context(sys.argv[1]))

    def run(job):
        Path("pid-%d" % os.getpid()).touch()
        job.record(x=job["x"])  # and so it is connected
        Path(f"told-{job['x']}").touch()
        while not job.stopped():
            time.sleep(0.01)
        Path(f"ended-{job['x']}").touch()

    if __name__ == "__main__":
        first, second = Evaluator(run, Pool(1)), Evaluator(run, Pool(1))
        first.submit([{"x": 1}])
        while not os.path.exists("told-1"):
            time.sleep(0.01)
        second.submit([{"x": 2}])  # by a worker that may be a fork, made when the other was connected
        time.sleep(600)
"""


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_master_that_is_killed_leaves_no_folder_and_its_workers_know(tmp_path: Path, how: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(_KILLED))
    short = tempfile.TemporaryDirectory(prefix="ek-")  # a folder of pytest may be too long for a socket
    temporary = Path(short.name)
    environment = os.environ | {"TMPDIR": short.name, "PYTHONPATH": os.pathsep.join(sys.path)}
    with short, subprocess.Popen([sys.executable, str(program), how], cwd=tmp_path, env=environment) as master:
        try:
            eventually(lambda: (tmp_path / "told-2").exists(), "the second job")
            assert len(list(temporary.glob("evalkit-*"))) == 2
            master.kill()
            eventually(lambda: len(list(tmp_path.glob("ended-*"))) == 2, "the end of both jobs")
            eventually(lambda: not list(temporary.glob("evalkit-*")), "the end of both folders")
        finally:
            master.kill()
            for file in tmp_path.glob("pid-*"):  # nobody else ends the workers of a pool whose master was killed
                os.kill(int(file.name.removeprefix("pid-")), signal.SIGKILL)


def test_requests_to_stop_reach_workers_that_are_there_and_those_that_come_later(channel: SocketChannel) -> None:
    early = elsewhere(channel)
    assert not early.stop_requested(7)
    channel.request_stop(7)
    eventually(lambda: early.stop_requested(7), "the request")
    late = elsewhere(channel)
    eventually(lambda: late.stop_requested(7), "the request")
    assert not late.stop_requested(8)
    channel.forget(7)
    later = elsewhere(channel)
    later.send(b"")
    assert not later.stop_requested(7)
    for client in (early, late, later):
        client.close()


def test_the_last_words_of_a_process_that_was_killed_are_heard(channel: SocketChannel, heard: Heard) -> None:
    program = """
        import os, pickle, signal, sys
        client = pickle.loads(bytes.fromhex(sys.argv[1]))
        for i in range(1000):
            client.send(b"%d" % i)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    code = "\n".join(line.strip() if "send" not in line else "    " + line.strip() for line in program.splitlines())
    subprocess.run([sys.executable, "-c", code, pickle.dumps(channel.client).hex()], timeout=BOUND, check=False)
    channel.drain(BOUND)
    assert heard == [b"%d" % i for i in range(1000)]


def test_a_worker_is_told_to_stop_when_the_master_has_gone(channel: SocketChannel) -> None:
    client = elsewhere(channel)
    assert not client.stop_requested(1)
    channel.close()
    channel.close()
    eventually(lambda: client.stop_requested(1), "that the master has gone")
    client.close()


def test_a_worker_that_cannot_connect_runs_its_jobs_all_the_same(channel: SocketChannel) -> None:
    channel.close()
    client = elsewhere(channel)
    assert not client.stop_requested(1)
    with pytest.raises(OSError, match="no way to the main process"):
        client.send(b"")


# -- a chunk ----------------------------------------------------------------------------------------------------------


class Recorder(SideChannelClient):
    """Keeps what is sent."""

    def __init__(self, stops: tuple[int, ...] = (), broken: bool = False) -> None:
        self.messages: list[Message] = []
        self.stops = set(stops)
        self.broken = broken

    def send(self, message: Any) -> None:
        if self.broken:
            raise OSError("the network is away")
        self.messages.append(message)

    def stop_requested(self, run: int) -> bool:
        return run in self.stops

    def sayings(self, kind: int) -> list[int]:
        """The indices of the jobs of which it was said."""
        return [saying[1] for message in list(self.messages) for saying in message.sayings if saying[0] == kind]


def work(function: Any, client: SideChannelClient, jobs: int, *, hold: float = 0.01) -> Outcome:
    program = Program(Setup(function, None, lambda: "me", client, hold))
    try:
        entries = (range(jobs), [f"s.{i}" for i in range(jobs)], [0] * jobs, [{"x": i} for i in range(jobs)])
        outcome: Outcome = program((100, entries, None))
        return outcome
    finally:
        program.discard()


def kinds(outcome: Outcome) -> list[tuple[int, int]]:
    return [(saying[0], saying[1]) for saying in outcome.sayings]


def test_a_job_that_was_asked_to_stop_before_it_started_does_not_run() -> None:
    ran: list[int] = []
    outcome = work(lambda job: ran.append(job["x"]), Recorder(stops=(101,)), 3)
    assert ran == [0, 2]
    assert kinds(outcome) == [(Kind.DONE, 0), (Kind.SKIPPED, 1), (Kind.DONE, 2)]
    assert outcome.jobs == 2


def test_a_request_to_stop_is_for_one_run() -> None:
    client = Recorder()

    def run(job: Any) -> bool:
        client.stops.add(101)
        return bool(job.stopped())

    outcome = work(run, client, 1)
    assert outcome.sayings[0][2] is False


def test_a_slow_job_is_told_of_with_what_ended_before_it_and_gives_back_what_waits_behind_it() -> None:
    client = Recorder()

    def run(job: Any) -> int:
        deadline = time.monotonic() + BOUND
        while job["x"] == 2 and not client.sayings(Kind.RETURNED) and time.monotonic() < deadline:
            time.sleep(0.001)
        return int(job["x"])

    outcome = work(run, client, 5)
    assert client.sayings(Kind.RETURNED) == [3, 4]
    assert client.sayings(Kind.STARTED) == [2]
    told = [*((kind, index) for message in client.messages for kind, index, *_ in message.sayings), *kinds(outcome)]
    assert [index for kind, index in told if kind == Kind.DONE] == [0, 1, 2]
    assert outcome.messages == len(client.messages)


def test_a_result_is_not_held_back_longer_than_said() -> None:
    client = Recorder()
    seen: list[int] = []

    def run(job: Any) -> None:
        # Each takes a part of the time that results may be held, so that no single one is slow.
        time.sleep(0.004)
        seen.append(len(client.sayings(Kind.DONE)))

    outcome = work(run, client, 40, hold=0.02)
    assert client.sayings(Kind.DONE), "they were told of before the call was over"
    assert seen[-1] > 0
    assert outcome.jobs + len(client.sayings(Kind.RETURNED)) == 40


def test_what_cannot_be_sent_comes_with_the_result() -> None:
    def run(job: Any) -> str:
        job.record(step=job["x"])
        job.report(0.5, "half way")
        if job["x"] == 1:
            time.sleep(0.1)  # long enough to be told of, and to have given back what waits
        return "done"

    outcome = work(run, Recorder(broken=True), 3)
    assert outcome.messages == 0
    assert [index for kind, index in kinds(outcome) if kind == Kind.DONE] == [0, 1, 2]
    assert [index for kind, index in kinds(outcome) if kind == Kind.RECORDED] == [0, 1, 2]
    assert Kind.RETURNED not in [kind for kind, _ in kinds(outcome)]


def test_progress_that_comes_too_fast_is_merged_and_the_last_word_is_not_lost() -> None:
    client = Recorder()
    said = threading.Event()

    def run(job: Any) -> None:
        for i in range(1000):
            job.report(i / 1000, str(i))
        deadline = time.monotonic() + BOUND
        while not said.is_set() and time.monotonic() < deadline:
            said.wait(0.001)
            phases = [one[3] for message in list(client.messages) for one in message.sayings if one[0] == Kind.PROGRESS]
            if phases and phases[-1] == "999":
                said.set()

    work(run, client, 1)
    assert said.is_set(), "it is told while the job runs, though the job said nothing more"
    assert len(client.sayings(Kind.PROGRESS)) < 500


def test_a_program_goes_to_a_worker_once_where_it_can_be_installed() -> None:
    setup = pickle.dumps(Setup(pickle.dumps(max), pickle.dumps(None), str, None, 0.01))
    program = Program(setup + bytes(2**20))
    resident = pickle.loads(pickle.dumps(program.resident))
    assert len(pickle.dumps(program.resident)) < 300
    with pytest.raises(RuntimeError, match="not been installed"):
        resident(pickle.dumps((0, [], None)))
    pickle.loads(pickle.dumps(program)).install()
    assert isinstance(resident(pickle.dumps((0, [], None))), bytes)
    program.discard()
