"""Which Ray is used, who ends it, and what is said when that cannot be."""

from __future__ import annotations

import glob
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap

import psutil
import pytest
import ray

from evalkit import Evaluator, JobCause
from evalkit.errors import BackendError
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, eventually, in_background
from evalkit_ray import session as session_module


def create(function=functions.echo, **kwargs):
    return Evaluator.create(function, "ray", {"grace": 0.2, **kwargs})


def run_program(text, **environment):
    """Run a program of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def runs(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def folders():
    parent = tempfile.gettempdir()
    return set(glob.glob(os.path.join(parent if len(parent) <= 24 else "/tmp", "ek-ray-*")))


@pytest.mark.slow
def test_without_an_address_a_local_ray_is_started_and_ends_with_the_last_evaluator():
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with create(num_workers=3, num_cpus_per_task=0.5) as first:
            assert signal.getsignal(signal.SIGTERM) is mine, "Ray does not keep the handler of SIGTERM"
            assert ray.cluster_resources()["CPU"] == max(os.cpu_count() or 1, 2)
            servers = [child for child in psutil.Process().children(recursive=True) if child.pid not in ours]
            commands = " ".join(word for child in servers for word in child.cmdline())
            its_folders = {folder for folder in folders() if folder in commands}  # other tests may have a Ray too
            assert its_folders
            listening = {
                connection.laddr.ip
                for process in [psutil.Process(), *servers]
                for connection in process.net_connections()
                if connection.status == psutil.CONN_LISTEN
            }
            assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, "it listens on loopback only"
            with create(num_workers=2, num_cpus_per_task=0.5) as second:  # shares it
                second.submit([{"x": 1}])
                assert second.gather("ALL")[0].output == {"x": 1}
            assert ray.is_initialized(), "it stays for the other evaluator"
            first.submit([{"x": 2}])
            assert first.gather("ALL")[0].output == {"x": 2}
            with pytest.warns(RuntimeWarning, match="num_cpus cannot be changed"):
                third = create(num_cpus=7)
            with third:
                third.submit([{"x": 3}])
                assert third.gather("ALL")[0].output == {"x": 3}
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not ray.is_initialized()
    assert not folders() & its_folders, "its folder is gone"


@pytest.mark.slow
def test_an_address_is_used_and_its_cluster_outlives_the_evaluators(monkeypatch):
    """One program has a Ray; others with the same token attach to it by address or RAY_ADDRESS, and not without."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with create(num_workers=1, num_cpus=3) as evaluator:
        address = ray.get_runtime_context().gcs_address
        program = """
            import os, sys
            import ray
            from evalkit import Evaluator
            from evalkit.testing import functions

            with Evaluator.create(functions.echo, "ray", {"num_workers": 1, %s}) as evaluator:
                evaluator.submit([{"x": 1}])
                assert evaluator.gather("ALL")[0].output == {"x": 1}
                print(ray.get_runtime_context().gcs_address)
            assert not ray.is_initialized()
        """
        at_loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # where this one listens
        assert run_program(program % f"'address': {address!r}", **at_loopback).strip() == address
        assert run_program(program % "", RAY_ADDRESS=address, **at_loopback).strip() == address
        assert run_program(program % "").strip() != address, "a cluster that is merely there is left alone"
        evaluator.submit([{"x": 1}])
        assert evaluator.gather("ALL")[0].output == {"x": 1}, "it outlives those who had attached themselves"


@pytest.mark.slow
def test_a_ray_of_the_users_own_is_used_and_left_alone():
    program = """
        import ray
        from evalkit import Evaluator
        from evalkit.testing import functions

        ray.init("local", num_cpus=1, include_dashboard=False, resources={"licence": 2})
        with Evaluator.create(functions.echo, "ray", {"resources_per_task": {"licence": 1}}) as evaluator:
            evaluator.submit([{"x": 1}])
            print(evaluator.gather("ALL")[0].output)
        assert ray.is_initialized()
        ray.shutdown()
    """
    assert run_program(program).strip() == "{'x': 1}"


@pytest.mark.slow
def test_a_runtime_env_reaches_the_jobs():
    def read(job):
        return os.environ.get(job["name"])

    with create(read, num_cpus=2, runtime_env={"env_vars": {"MARK_OF_THE_FIRST": "1"}}) as first:
        first.submit([{"name": "MARK_OF_THE_FIRST"}])
        assert first.gather("ALL")[0].output == "1"
        with create(read, runtime_env={"env_vars": {"MARK_OF_THE_SECOND": "2"}}) as second:
            second.submit([{"name": "MARK_OF_THE_SECOND"}])
            assert second.gather("ALL")[0].output == "2"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_is_ended_leaves_no_process(number, tmp_path):
    program = """
        import os
        import time
        import ray
        from evalkit import Evaluator

        def run(job):
            time.sleep(1000)

        evaluator = Evaluator.create(run, "ray", {"num_workers": 2})
        evaluator.submit([{}, {}])
        print(os.path.dirname(ray.get_runtime_context().get_temp_dir()), flush=True)
        evaluator.gather("ALL")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        folder = process.stdout.readline().strip()
        assert os.path.isdir(folder)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4, "Ray's servers"
        process.send_signal(number)
        assert process.wait(BOUND) == (15 if number == signal.SIGTERM else -9)
    # Ray's own agents would take a minute to notice.
    eventually(lambda: not any(runs(child) for child in children), "the end of all processes", 5.0)
    eventually(lambda: not os.path.exists(folder), "the end of Ray's folder")


@pytest.mark.slow
def test_a_fork_of_the_program_does_not_hold_up_the_end():
    done = run_program(
        """
        import os, time
        import ray
        from evalkit import Evaluator

        evaluator = Evaluator.create(lambda job: 1, "ray", {"num_workers": 1})
        folder = os.path.dirname(ray.get_runtime_context().get_temp_dir())
        child = os.fork()
        if not child:
            time.sleep(600)
            os._exit(0)
        evaluator.close()
        print(os.path.exists(folder))
        os.kill(child, 9)
        """
    )
    assert done.strip() == "False"


@pytest.mark.slow
def test_a_ray_that_is_shut_down_under_an_evaluator_fails_its_jobs(tmp_path):
    evaluator = create(functions.Plain(functions.hold), num_workers=1)
    jobs = evaluator.submit([{"started": str(tmp_path / "started"), "release": str(tmp_path / "never")}, {"x": 1}])
    eventually((tmp_path / "started").exists, "the start of the first job")
    ray.shutdown()
    assert in_background(evaluator.gather, "ALL").result(BOUND) == jobs
    assert all(job.is_failed for job in jobs)
    # Ray ends its workers before it says that it is shut down.
    assert jobs[0].cause is JobCause.CRASH or "Ray was shut down under this evaluator" in str(jobs[0].error)
    assert "Ray was shut down under this evaluator" in str(jobs[1].error)
    assert not ray.is_initialized(), "it does not connect itself to whatever it finds"
    evaluator.close()


@pytest.mark.slow
def test_jobs_that_come_after_the_end_of_ray_leave_none_behind(tmp_path):
    """A call that cannot be sent makes an end of the executor, and what is still in that fails with it."""
    evaluator = create(functions.Plain(functions.hold), num_workers=2)
    jobs = evaluator.submit([{"started": str(tmp_path / "started"), "release": str(tmp_path / "never")}])
    eventually((tmp_path / "started").exists, "the start of the first job")
    ray.shutdown()
    jobs += evaluator.submit([{"x": 1}])
    assert sorted(in_background(evaluator.gather, "ALL").result(BOUND), key=jobs.index) == jobs
    assert all(job.is_failed for job in jobs)
    # Ray ends its workers before it says that it is shut down.
    assert jobs[0].cause is JobCause.CRASH or "Ray was shut down under this evaluator" in str(jobs[0].error)
    assert "Ray was shut down under this evaluator" in str(jobs[1].error)
    evaluator.close()


def use(**settings):
    with create(num_workers=1, **settings) as evaluator:
        evaluator.submit([{"x": 1}])
        assert evaluator.gather("ALL")[0].output == {"x": 1}


@pytest.mark.slow
def test_the_token_of_a_local_ray_ends_with_it(monkeypatch, tmp_path):
    """A cluster with another token is joined after it, and a local Ray is started after that."""
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
    monkeypatch.setenv("HOME", str(tmp_path))
    program = """
        import sys
        import ray

        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        print(ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **settings},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        address = process.stdout.readline().strip()
        before = dict(os.environ)
        use()
        assert dict(os.environ) == before
        assert not os.listdir(tmp_path), "Ray keeps its tokens there, readable for everyone"
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            use(address=address)
        use()
        assert dict(os.environ) == before
        process.stdin.close()


@pytest.mark.slow
def test_a_program_without_the_token_does_not_join_a_local_ray():
    with create(num_workers=1):
        address = ray.get_runtime_context().gcs_address
        program = f"import ray; ray.init({address!r}); print('joined')"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode != 0
    assert "joined" not in done.stdout


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_an_address_where_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(BackendError, match=f"no Ray answers at '127.0.0.1:{port}': .*refused"):
        create(address=f"127.0.0.1:{port}")
    assert not ray.is_initialized()


def test_an_address_where_somebody_else_listens(monkeypatch):
    monkeypatch.setattr(session_module, "_ANSWER_TIMEOUT", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(BackendError, match=rf"no Ray answers at '{address}' \(from RAY_ADDRESS\): .*3 s"):
            create()
    assert not ray.is_initialized()


def test_a_size_for_a_cluster_that_exists():
    with pytest.raises(BackendError, match=r"num_cpus sizes a local Ray, and '10\.0\.0\.5:6379' names one"):
        create(address="10.0.0.5:6379", num_cpus=4)


@pytest.mark.slow
def test_more_than_there_is_is_an_error_at_once():
    demands = [
        ({"num_gpus_per_task": 1}, "CPU: 1, GPU: 1: .* GPU: 0"),
        ({"num_cpus_per_task": 8}, "CPU: 8: .* CPU: 2"),
        ({"resources_per_task": {"licence": 3}}, "licence: 3: .* licence: 2"),
    ]
    with create(num_cpus=2, num_gpus=0, ray_kwargs={"resources": {"licence": 2}}):
        for demand, said in demands:
            with pytest.raises(BackendError, match=f"no node of Ray has what one job takes, .*{said}"):
                create(**demand)
        assert ray.is_initialized(), "those who fail leave it to the one that has it"
    assert not ray.is_initialized()


def test_a_local_ray_that_does_not_start(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with pytest.raises(BackendError, match=r"a local Ray does not start: .*no_such_argument"):
            create(ray_kwargs={"no_such_argument": 1})
        assert not os.listdir(folder)


def test_a_folder_of_the_users_that_others_can_enter_is_warned_of(tmp_path):
    def start(folder):
        with pytest.raises(BackendError, match="no_such_argument"):
            create(ray_kwargs={"_temp_dir": str(folder), "no_such_argument": 1})

    (tmp_path / "closed").mkdir(mode=0o700)
    start(tmp_path / "closed" / "ray")
    with (  # open above it; Ray opens the folder itself
        tempfile.TemporaryDirectory() as folder,
        pytest.warns(RuntimeWarning, match=f"write to {folder}, and so run code as you"),
    ):
        start(folder)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"address": 6379}, TypeError, "address takes a text"),
        ({"num_cpus": "four"}, TypeError, "num_cpus takes a number"),
        ({"num_gpus_per_task": -1}, ValueError, "num_gpus_per_task takes a number from 0 on, not -1"),
        ({"num_cpus_per_task": float("nan")}, ValueError, "num_cpus_per_task"),
        ({"resources_per_task": {"GPU": 1}}, ValueError, "num_gpus_per_task"),
        ({"resources_per_task": {"licence": "x"}}, TypeError, "licence"),
        ({"resources_per_task": ["licence"]}, TypeError, "resources_per_task takes a mapping"),
        ({"runtime_env": "env.yaml"}, TypeError, "runtime_env takes a mapping"),
        ({"ray_kwargs": {"num_cpus": 4}}, ValueError, "give it as num_cpus="),
        ({"num_cpu": 4}, ValueError, "num_cpus"),
    ],
)
def test_options_that_make_no_sense(options, error, said):
    with pytest.raises(error, match=said):
        create(**options)
    assert not ray.is_initialized()
