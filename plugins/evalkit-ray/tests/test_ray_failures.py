"""What dies: a worker, a node of a simulated cluster, the actor of the side channel; and what Ray's errors mean."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import time

import psutil
import pytest
import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from evalkit import Evaluator, JobCause, JobState
from evalkit.backends import Reach
from evalkit.testing.backend_fixtures import BOUND, eventually, gathering, in_background
from evalkit_ray.backend import RayBackend


def where_and_wait(job):
    """Say on which node it runs, and wait for the file ``go``."""
    node = ray.get_runtime_context().get_node_id()
    with open(os.path.join(job["room"], f"{job.id}.{node}"), "w"):
        pass
    job.record(node=node)
    while not os.path.exists(os.path.join(job["room"], "go")):
        time.sleep(0.01)
    return node


def tiny(job):
    return job["x"]


def actors():
    """The processes of the actors of side channels, each with its raylet."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "Postbox" in child.name() and child.status() != psutil.STATUS_ZOMBIE:
                found[child.pid] = child.ppid()
    return found


class Nodes:
    """A cluster of three nodes on this machine: the one of this program, which runs no jobs, and two others."""

    def __init__(self):
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.workers = [self.cluster.add_node(num_cpus=2, include_dashboard=False) for _ in range(2)]
        self.cluster.wait_for_nodes()

    def check_actor(self):
        """What jobs say goes through an actor on the node of this program, with which all would end anyway."""
        (raylet,) = self.cluster.head_node.all_processes[ray_constants.PROCESS_TYPE_RAYLET]
        eventually(actors, "the start of the actor")
        assert set(actors().values()) == {raylet.process.pid}

    def close(self):
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def nodes(monkeypatch):
    # On loopback only, for the processes of the cluster, this one, and those that it starts.
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    before = set(psutil.Process().children(recursive=True))
    nodes = Nodes()
    yield nodes
    nodes.close()
    eventually(lambda: not set(psutil.Process().children(recursive=True)) - before, "the end of the cluster")


@pytest.mark.slow
def test_nothing_is_lost_with_a_node(nodes, tmp_path):
    """One node of three is removed while it runs jobs: they run again elsewhere, and no retry is used up."""
    settings = {"num_workers": 4, "address": nodes.cluster.address, "grace": 0.2}
    with Evaluator.create(where_and_wait, "ray", settings) as evaluator:
        jobs = evaluator.submit([{"room": str(tmp_path), "x": x} for x in range(12)])
        gone, stays = (node.node_id for node in nodes.workers)
        with gathering(evaluator) as gathered:
            eventually(lambda: {name.rpartition(".")[2] for name in os.listdir(tmp_path)} == {gone, stays}, "both")
            on_it = {name.rpartition(".")[0] for name in os.listdir(tmp_path) if name.endswith(gone)}
            eventually(lambda: all(job.is_running for job in jobs if job.id in on_it), "the start of the jobs")
            nodes.check_actor()
            nodes.cluster.remove_node(nodes.workers[0])
            (tmp_path / "go").touch()
        assert gathered.result() == jobs
        assert [(job.state, job.output) for job in jobs] == [(JobState.DONE, stays)] * 12
        assert on_it
        assert all(job.records[-1] == {"node": stays} for job in jobs)

    with Evaluator.create(tiny, "ray", settings) as evaluator:
        jobs = evaluator.submit([{"x": x} for x in range(3000)])
        assert in_background(evaluator.gather, "ALL").result(2 * BOUND) == jobs
        assert [job.output for job in jobs] == list(range(3000)), "what is left of the cluster is used"
        nodes.check_actor()


@pytest.mark.slow
def test_nothing_of_many_tiny_jobs_is_lost_with_a_node(nodes):
    """The same for jobs that travel many at a time."""
    settings = {"num_workers": 4, "address": nodes.cluster.address, "grace": 0.2}
    with Evaluator.create(tiny, "ray", settings) as evaluator:
        jobs = evaluator.submit([{"x": x} for x in range(30_000)])
        done = [*evaluator.gather("BATCH", 2000)]
        nodes.check_actor()
        nodes.cluster.remove_node(nodes.workers[1], allow_graceful=False)
        done += in_background(evaluator.gather, "ALL").result(2 * BOUND)
        assert sorted(job.args["x"] for job in done) == list(range(30_000))
        assert {job.state for job in jobs} == {JobState.DONE}
        assert [job.output for job in jobs] == list(range(30_000))


def die_in_the_middle(job):
    if job["x"] == 700:
        os._exit(7)
    return job["x"]


def with_child(job):
    process = subprocess.Popen(["sleep", "1000"])
    job.record(child=process.pid)
    if job["how"] == "die":
        os._exit(3)
    time.sleep(1000)


def tell_and_listen(job):
    job.record(before=True)
    while not os.path.exists(job["go"]):
        time.sleep(0.01)
    job.record(after=True)
    while not job.stopped():
        time.sleep(0.01)
    return "stopped"


@pytest.mark.usefixtures("local_ray")
class TestLocal:
    def create(self, function, **kwargs):
        return Evaluator.create(function, "ray", {"grace": 0.2, **kwargs})

    def test_a_job_that_dies_among_tiny_ones_is_alone_to_fail(self):
        with self.create(die_in_the_middle, num_workers=2) as evaluator:
            jobs = evaluator.submit([{"x": x} for x in range(2000)])
            in_background(evaluator.gather, "ALL").result(BOUND)
            assert [job.args["x"] for job in jobs if job.is_failed] == [700]
            assert (jobs[700].cause, jobs[700].error.type) == (JobCause.CRASH, "WorkerDied")

    @pytest.mark.parametrize("how", ["die", "time out"])
    def test_what_a_dead_job_had_started_is_dead(self, how):
        with self.create(with_child, job_timeout=None if how == "die" else 3.0) as evaluator:
            (job,) = evaluator.submit([{"how": how}])
            in_background(evaluator.gather, "ALL").result(BOUND)
            assert job.cause is (JobCause.CRASH if how == "die" else JobCause.TIMEOUT)
            child = job.records[0]["child"]
            eventually(lambda: not _runs(child), "the end of what it had started")

    def test_the_side_channel_is_made_again(self, tmp_path):
        """Its actor is killed: what jobs say afterwards, and requests to stop, still come through."""
        go = tmp_path / "go"
        with self.create(tell_and_listen, grace=BOUND) as evaluator:
            (job,) = evaluator.submit([{"go": str(go)}])
            eventually(lambda: job.records, "the first record")
            (name,) = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
            before = actors()
            ray.kill(ray.get_actor(name, namespace="evalkit"), no_restart=False)
            # What it is told while it is about to die, it takes along.
            eventually(lambda: not actors().keys() & before.keys(), "the end of the actor")
            go.touch()
            eventually(lambda: len(job.records) == 2, "the second record")
            job.cancel()
            in_background(evaluator.gather, "ALL").result(BOUND)
            assert job.state is JobState.CANCELLED
            assert job.records == [{"before": True}, {"after": True}]

    def test_nothing_of_an_evaluator_stays_in_ray(self):
        with self.create(tiny) as evaluator:
            evaluator.submit([{"x": 1}])
            evaluator.gather("ALL")
            assert len(ray.util.list_named_actors(all_namespaces=True)) == 1
        eventually(lambda: not ray.util.list_named_actors(all_namespaces=True), "the end of its actor")

    def test_a_module_that_is_not_there_is_named(self, tmp_path):
        """What was imported here from a place that the workers cannot see."""
        (tmp_path / "only_here.py").write_text("def double(job):\n    return 2 * job['x']\n")
        sys.path.insert(0, str(tmp_path))
        try:
            double = importlib.import_module("only_here").double
        finally:
            sys.path.remove(str(tmp_path))
        with self.create(double) as evaluator:
            (job,) = evaluator.submit([{"x": 1}])
            evaluator.gather("ALL")
        assert job.cause is JobCause.EXCEPTION
        assert "No module named 'only_here'" in str(job.error)

    def test_jobs_may_use_ray_where_they_take_all_cpus(self):
        """A task lends its CPU to others while it waits for them; an actor would keep it, and wait for ever."""
        with self.create(_ask_ray, num_workers=4) as evaluator:
            jobs = evaluator.submit([{"x": x} for x in range(12)])
            in_background(evaluator.gather, "ALL").result(BOUND)
            assert [job.output for job in jobs] == [x + 1 for x in range(12)]

    def test_more_workers_than_room_share_it(self):
        """Jobs that wait in Ray have not started, so their time does not run."""
        with self.create(_nap, num_workers=6, num_cpus_per_task=4, job_timeout=5.0) as evaluator:
            jobs = evaluator.submit([{"seconds": 1.2} for _ in range(6)])
            in_background(evaluator.gather, "ALL").result(BOUND)
            assert [job.state for job in jobs] == [JobState.DONE] * 6


def _nap(job):
    time.sleep(job["seconds"])


def _ask_ray(job):
    return ray.get(ray.remote(num_cpus=1)(lambda x: x + 1).remote(job["x"]))


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_whatever_ray_says_when_it_was_shut_down_it_is_that(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    fault = RayBackend(1).blame(ray.exceptions.WorkerCrashedError())
    assert (fault.reach, fault.cause) == (Reach.CALL, JobCause.LOST)
    assert "Ray was shut down under this evaluator" in fault.error.message


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("exc", "cause"),
    [
        (ray.exceptions.WorkerCrashedError(), JobCause.CRASH),
        (ray.exceptions.OutOfMemoryError("the node is low on memory"), JobCause.MEMORY),
        (ray.exceptions.NodeDiedError("the node is gone"), JobCause.LOST),
        (ray.exceptions.ObjectLostError("ab", None, ""), JobCause.LOST),
        (ray.exceptions.OwnerDiedError("ab", None, ""), JobCause.LOST),
        (ray.exceptions.RuntimeEnvSetupError("no such package"), JobCause.EXCEPTION),
        (ray.exceptions.RayTaskError("run_chunk", "No module named 'evalkit'", ValueError()), JobCause.EXCEPTION),
    ],
)
def test_what_the_errors_of_ray_mean(exc, cause):
    fault = RayBackend(1).blame(exc)
    assert (fault.reach, fault.cause) == (Reach.CALL, cause)
    assert fault.error.message
