"""Calls that reach a task over a line, after its first: what becomes of them when something dies or comes too late."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import ray

from evalkit import Evaluator, JobCause, JobState
from evalkit.backends import Peers
from evalkit.testing.backend_fixtures import BOUND, in_background
from evalkit_ray import executor as executor_module
from evalkit_ray import lines
from evalkit_ray.executor import RayExecutor
from evalkit_ray.task import Delivery, run_chunk

BIG = 3 * lines.LONGEST


def note_run(job):
    with open(job["runs"], "a") as file:
        file.write(f"{job['x']}\n")


def which_task(job):
    return ray.get_runtime_context().get_task_id()


def die_now_and_then(job):
    note_run(job)
    if job["x"] % 7 == 3:
        os._exit(3)
    return job["x"]


def hang_now_and_then(job):
    note_run(job)
    if job["x"] % 7 == 3:
        time.sleep(10 * BOUND)
    return job["x"]


def large_now_and_then(job):
    note_run(job)
    return job["x"] if job["x"] % 3 else bytes(BIG)


def take(job):
    note_run(job)
    return len(job["ballast"])


def one_by_one(evaluator, parameters, pause=lambda x: 0.0):
    """Submit one at a time, each when there is room for it, as a search does; return all jobs in order."""
    jobs, back = [], []
    for args in parameters:
        if len(jobs) - len(back) == 2:
            back += in_background(evaluator.gather, "BATCH", 1).result(BOUND)
        time.sleep(pause(args["x"]))
        jobs += evaluator.submit([args])
    back += in_background(evaluator.gather, "ALL").result(BOUND)
    assert sorted(back, key=jobs.index) == jobs, "each came back, once"
    return jobs


def runs(path):
    return sorted(map(int, Path(path).read_text().split()))


@pytest.mark.usefixtures("local_ray")
class TestLines:
    def create(self, function, **kwargs):
        return Evaluator.create(function, "ray", {"grace": 0.2, "num_workers": 2, **kwargs})

    def test_cheap_calls_one_after_another_share_a_task(self):
        with self.create(which_task) as evaluator:
            jobs = one_by_one(evaluator, [{"x": x} for x in range(300)])
        assert len({job.output for job in jobs}) < 200

    def test_who_dies_is_alone_to_fail_and_nobody_runs_twice(self, tmp_path):
        path = str(tmp_path / "runs")
        with self.create(die_now_and_then) as evaluator:
            jobs = one_by_one(evaluator, [{"x": x, "runs": path} for x in range(50)])
        died = [job for job in jobs if job.args["x"] % 7 == 3]
        assert {(job.state, job.cause) for job in died} == {(JobState.FAILED, JobCause.CRASH)}
        assert all(job.output == job.args["x"] for job in jobs if job not in died)
        assert runs(path) == list(range(50))

    def test_who_is_past_its_time_is_alone_to_be_ended(self, tmp_path):
        path = str(tmp_path / "runs")
        with self.create(hang_now_and_then, job_timeout=1.0) as evaluator:
            jobs = one_by_one(evaluator, [{"x": x, "runs": path} for x in range(20)])
        late = [job for job in jobs if job.args["x"] % 7 == 3]
        assert {(job.state, job.cause) for job in late} == {(JobState.FAILED, JobCause.TIMEOUT)}
        assert all(job.output == job.args["x"] for job in jobs if job not in late)
        assert runs(path) == list(range(20))

    def test_a_call_that_comes_when_its_task_is_about_to_end_runs_once(self, tmp_path):
        path = str(tmp_path / "runs")
        with self.create(take) as evaluator:
            # From well before the end to well after it, in steps that hit it.
            parameters = [{"x": x, "runs": path, "ballast": "-"} for x in range(400)]
            jobs = one_by_one(evaluator, parameters, pause=lambda x: 0.003 + x % 100 * 3e-5)
        assert {job.output for job in jobs} == {1}
        assert runs(path) == list(range(400))

    def test_what_is_too_large_for_a_line_goes_through_ray(self, tmp_path):
        path = str(tmp_path / "runs")
        with self.create(large_now_and_then) as evaluator:
            jobs = one_by_one(evaluator, [{"x": x, "runs": path} for x in range(60)])
        assert [job.output for job in jobs] == [x if x % 3 else bytes(BIG) for x in range(60)]
        assert runs(path) == list(range(60))
        with self.create(take) as evaluator:
            sizes = [BIG if x % 3 else x for x in range(60)]
            parameters = [{"x": 100 + x, "runs": path, "ballast": bytes(size)} for x, size in enumerate(sizes)]
            jobs = one_by_one(evaluator, parameters)
        assert [job.output for job in jobs] == sizes
        assert runs(path) == [*range(60), *range(100, 160)]

    def test_without_descriptors_left_nothing_is_lost(self, tmp_path):
        """The worker has sent its answer, and cannot know that nobody could open the line."""
        path = str(tmp_path / "runs")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with self.create(take) as evaluator:
            parameters = [{"x": x, "runs": path, "ballast": "-"} for x in range(30)]
            jobs = one_by_one(evaluator, parameters[:10])
            time.sleep(0.02)  # the lines end
            taken = []
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(os.open(os.devnull, os.O_RDONLY))
                jobs += one_by_one(evaluator, parameters[10:])
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for fd in taken:
                    os.close(fd)
        assert {job.output for job in jobs} == {1}
        assert runs(path) == list(range(30))

    @pytest.mark.parametrize("killed", [False, True])
    def test_a_call_that_comes_too_late_never_has_the_answer_of_the_one_before(self, monkeypatch, killed):
        taken = []
        executor = RayExecutor({"num_cpus": 1})
        try:
            with monkeypatch.context() as patch:
                # As if the task had stopped listening in this moment.
                patch.setattr(executor_module, "give", lambda line, call: taken.append(call) is None)
                while not taken:
                    assert executor.submit(bytes.upper, b"first").result(BOUND) == b"FIRST"
                    late = executor.submit(bytes.upper, b"second")
                    if killed and taken:
                        executor.kill(late)
                    with contextlib.suppress(ray.exceptions.TaskCancelledError):
                        assert late.result(BOUND) == b"SECOND"
                        assert not (killed and taken)
        finally:
            executor.end(BOUND, kill=True)

    def test_a_call_that_was_given_up_is_not_answered_later(self, tmp_path, monkeypatch):
        """Ray seems to be gone, and then a task ends all the same: those that follow are served."""
        executor = RayExecutor({"num_cpus": 1})
        try:
            with monkeypatch.context() as patch:
                future = executor.submit(os.listdir, str(tmp_path / "never").encode())  # raises, later
                patch.setattr(executor_module, "_LOOK", 0.0)
                patch.setattr(ray, "is_initialized", lambda: False)
                with contextlib.suppress(RuntimeError, FileNotFoundError, ray.exceptions.RayTaskError):
                    future.result(BOUND)
            assert executor.submit(bytes.upper, b"second").result(BOUND) == b"SECOND"
        finally:
            executor.end(BOUND, kill=True)

    def test_a_call_that_is_killed_leaves_the_next_one_alone(self):
        """A task that is to be ended takes no more calls, whatever it still answers. If Ray hits another task that came
        into the worker meanwhile, that call is lost, and not to blame.
        """
        executor = RayExecutor({"num_cpus": 1})
        try:
            for number in range(15):
                future = executor.submit(bytes.upper, b"first")
                if number % 2:
                    time.sleep(0.001 * (number % 5))
                executor.kill(future)
                next_one = executor.submit(bytes.upper, b"second")
                with contextlib.suppress(ray.exceptions.TaskCancelledError):
                    assert next_one.result(BOUND) == b"SECOND"
                wait([future], BOUND)
        finally:
            executor.end(BOUND, kill=True)


# -- the task, in this process ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
class TestTask:
    def run(self, ends, program):
        node = ray.get_runtime_context().get_node_id()
        return run_chunk((uuid.uuid4().hex, 1, node, ends.address), b"call", Delivery(program, []))

    def test_the_answer_is_sent_and_reported(self, ends):
        assert self.run(ends, bytes.upper) == (1, b"CALL")
        ((_, messages),) = hear(ends)
        assert messages == [b"CALL"]

    def test_a_job_may_forbid_sockets(self, ends, monkeypatch):
        def forbid(*_args, **_kwargs):
            raise RuntimeError("no network here")

        def program(chunk):
            monkeypatch.setattr(socket, "socket", forbid)
            return chunk.upper()

        try:
            assert self.run(ends, program) == (1, b"CALL")
        finally:
            monkeypatch.undo()

    def test_a_job_may_close_the_line(self, ends):
        closed = []

        def program(chunk):
            if chunk == b"second":
                for fd in map(int, os.listdir("/proc/self/fd")):
                    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
                        if sock.getpeername() == line.sock.getsockname():
                            os.close(fd)
                            closed.append(fd)
            return chunk.upper()

        with ThreadPoolExecutor(1) as pool:
            for _ in range(100):  # it waits for milliseconds only
                running = pool.submit(self.run, ends, program)
                ((line, _),) = hear(ends)
                lines.give(line, b"second")
                calls, answer = running.result(BOUND)
                assert (calls, answer) in [(1, b"CALL"), (2, b"SECOND")]
                if calls == 2:
                    break
                assert hear(ends) == [(line, None)]
                ends.drop(line)
        assert (calls, len(closed)) == (2, 1)


# -- the lines themselves ---------------------------------------------------------------------------------------------


@pytest.fixture
def ends():
    ends = Peers()
    yield ends
    ends.close()


def hear(ends):
    """What is said next, after the first word."""
    while True:
        heard = ends.turn(BOUND)
        assert heard is not None, "nothing was heard"
        if heard and heard[0][1] != []:
            return heard


def test_messages_go_both_ways(ends):
    with lines.connect(ends.address, 7) as sock:
        assert lines.answer(sock, b"one")
        ((line, messages),) = hear(ends)
        assert (line.number, messages) == (7, [b"one"])
        assert lines.give(line, bytes(lines.LONGEST))
        assert lines.receive(sock, BOUND) == bytes(lines.LONGEST)
        assert lines.answer(sock, bytes(lines.LONGEST))
        assert hear(ends) == [(line, [bytes(lines.LONGEST)])]
        assert lines.receive(sock, 0.001) is None
    assert hear(ends) == [(line, None)]
    assert not lines.give(line, b"late")
    ends.drop(line)
    assert not lines.give(line, b"late")


def test_a_worker_that_is_hung_up_on_hears_it(ends):
    with lines.connect(ends.address, 7) as sock:
        lines.answer(sock, b"one")
        ((line, _),) = hear(ends)
        lines.hang_up(line)
        assert lines.receive(sock, BOUND) is None
        assert not lines.give(line, b"late")


def test_without_a_way_there_is_no_line(ends):
    address = ends.address
    ends.close()
    assert lines.connect(address, 1) is None
