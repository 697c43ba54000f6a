"""Programs of several ranks, as users write them: who drives, who serves, and how they end."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

HEAD = """
    import json, os, pathlib, sys, time
    from evalkit import Callback, Evaluator

    def run(job):
        return job["x"] ** 2
"""


def lines(done):
    return sorted(done.stdout.splitlines())


def test_the_root_drives_and_all_go_on_past_the_block_together(program):
    done = program.script(
        3,
        HEAD
        + """
    with Evaluator.create(run, "mpicomm") as evaluator:
        if evaluator.is_master:
            evaluator.submit([{"x": x} for x in range(100)])
            jobs = evaluator.gather("ALL")
            assert [job.output for job in jobs] == [x**2 for x in range(100)]
            print(evaluator.num_workers, sorted({job.metadata["worker"] for job in jobs}))
            pathlib.Path("gathered").touch()
    print("past", evaluator.is_master, pathlib.Path("gathered").exists())
    """,
    )
    assert done.returncode == 0, done.stderr
    assert lines(done) == [
        "2 ['rank 1 of 3', 'rank 2 of 3']",
        "past False True",
        "past False True",
        "past True True",
    ]
    assert done.stderr == ""


def test_ranks_that_serve_store_nothing_call_nobody_and_say_so_when_they_are_used(program):
    done = program.script(
        3,
        HEAD
        + """
    class Loud(Callback):
        def on_launch(self, job): print("called")
        def on_close(self): print("called")

    from mpi4py import MPI
    rank = MPI.COMM_WORLD.Get_rank()
    kwargs = {"storage": f"sqlite:///{rank}.db", "callbacks": [Loud()]}
    with Evaluator.create(run, "mpicomm", kwargs) as evaluator:
        evaluator.timeout = 60
        if evaluator.is_master:
            evaluator.submit([{"x": 1}])
            evaluator.gather("ALL")
        else:
            for use in (lambda: evaluator.submit([{"x": 1}]), lambda: evaluator.gather("ALL")):
                try:
                    use()
                except RuntimeError as exc:
                    print(type(exc).__name__, "if evaluator.is_master:" in str(exc))
            print(evaluator.close(), evaluator.num_jobs_submitted)
    """,
    )
    assert done.returncode == 0, done.stderr
    assert lines(done) == sorted(["called"] * 2 + ["EvaluatorClosedError True"] * 4 + ["[] 0"] * 2)
    assert (program.exists("0.db"), program.exists("1.db"), program.exists("2.db")) == (True, False, False)


def test_another_root_and_another_communicator(program):
    done = program.script(
        4,
        HEAD
        + """
    from mpi4py import MPI
    world = MPI.COMM_WORLD
    half = world.Split(world.Get_rank() // 2, world.Get_rank())
    with Evaluator.create(run, "mpicomm", {"comm": half, "root": 1}) as evaluator:
        if evaluator.is_master:
            evaluator.submit([{"x": 3}])
            (job,) = evaluator.gather("ALL")
            print(world.Get_rank(), job.output, job.metadata["worker"])
    """,
    )
    assert done.returncode == 0, done.stderr
    assert lines(done) == ["1 9 rank 0 of 2", "3 9 rank 0 of 2"]


def test_evaluators_one_after_the_other_and_at_the_same_time(program):
    done = program.script(
        3,
        HEAD
        + """
    for _ in range(20):
        with Evaluator.create(run, "mpicomm") as first:
            second = Evaluator.create(lambda job: -job["x"], "mpicomm", {"num_workers": 1})
            with second, Evaluator.create(run, "mpicomm") as third:
                if first.is_master:
                    for evaluator in (first, second, third):
                        evaluator.submit([{"x": x} for x in (1, 2)])
                    print([[job.output for job in e.gather("ALL")] for e in (first, second, third)])
    """,
    )
    assert done.returncode == 0, done.stderr
    assert lines(done) == ["[[1, 4], [-1, -2], [1, 4]]"] * 20


@pytest.mark.parametrize(
    ("what", "code", "shown"),
    [
        ("raise ValueError('on the root')", 1, "ValueError: on the root"),
        ("sys.exit(7)", 7, "all 3 ranks end"),
        ("os.kill(os.getpid(), 2); time.sleep(60)", 130, "KeyboardInterrupt"),
    ],
)
def test_an_exception_that_leaves_the_block_on_the_root_ends_every_rank(program, what, code, shown):
    done = program.script(
        3,
        HEAD
        + f"""
    with Evaluator.create(run, "mpicomm", {{"storage": "sqlite:///s.db"}}) as evaluator:
        if evaluator.is_master:
            evaluator.submit([{{"x": 1}}])
            evaluator.gather("ALL")
            {what}
    print("past")
    """,
    )
    assert done.returncode == code, done.stderr
    assert shown in done.stderr
    assert ("script.py" in done.stderr) == (code != 7), "the traceback leads to the line"
    assert done.stdout == ""
    program.run(1, "evalkit", "export", "0", "--storage", "sqlite:///s.db", "-o", "out.jsonl")
    assert '"objective": 1' in (program.folder / "out.jsonl").read_text(), "what was gathered is stored"


def test_a_block_left_in_good_order_by_an_exit_ends_nobody(program):
    done = program.script(
        3,
        HEAD
        + """
    with Evaluator.create(run, "mpicomm") as evaluator:
        if evaluator.is_master:
            sys.exit(0)
    print("past")
    """,
    )
    assert (done.returncode, done.stdout) == (0, "past\n" * 2), done.stderr


def test_what_the_function_holds_goes_to_each_worker_once(program):
    done = program.script(
        3,
        HEAD
        + """
    class Table:
        def __reduce__(self):
            with open("packed", "a") as file:
                file.write("x")
            return unpacked, ()

    def unpacked():
        with open("unpacked", "a") as file:
            file.write("x")
        return Table()

    table = Table()

    def use(job):
        assert type(table).__name__ == "Table"
        return job["x"]

    with Evaluator.create(use, "mpicomm", {"batching": False}) as evaluator:
        if evaluator.is_master:
            evaluator.submit([{"x": x} for x in range(50)])
            assert [job.output for job in evaluator.gather("ALL")] == list(range(50))
    """,
    )
    assert done.returncode == 0, done.stderr
    assert len((program.folder / "unpacked").read_text()) == 2
    assert len((program.folder / "packed").read_text()) == 1


def test_an_exception_in_a_worker_says_in_which_rank_and_where(program):
    done = program.script(
        2,
        HEAD
        + """
    import socket
    with Evaluator.create(lambda job: 1 / job["x"], "mpicomm") as evaluator:
        if evaluator.is_master:
            evaluator.submit([{"x": 0}])
            (job,) = evaluator.gather("ALL")
            print(job.error)
            print(job.error.traceback.splitlines()[-1] == f"in rank 1 of 2 on {socket.gethostname()}")
    """,
    )
    assert done.stdout.splitlines() == ["ZeroDivisionError: division by zero", "True"], done.stderr


def test_one_rank_alone_is_told_what_to_type(program):
    script = HEAD + "    Evaluator.create(run, 'mpicomm', {'num_workers': 4})\n"
    done = program.script(1, script, "--lr", "0.1 0.2")
    assert done.returncode == 1
    assert "BackendError: mpicomm needs" in done.stderr
    assert "mpiexec -n 5 python" in done.stderr
    assert "script.py --lr '0.1 0.2'" in done.stderr


def test_a_launcher_of_another_library_is_named(program):
    program.env["OMPI_COMM_WORLD_SIZE"] = "3"
    done = program.script(1, HEAD + "    Evaluator.create(run, 'mpicomm')\n")
    assert "OMPI_COMM_WORLD_SIZE=3" in done.stderr
    assert "MPICH" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{'num_workers': 3}", "num_workers=3 needs 4 ranks"),
        ("{'root': 3}", "from 0 to 2, not 3"),
        ("{'comm': 1}", "takes an intracommunicator"),
        ("{'rot': 1}", "did you mean 'root'"),
    ],
)
def test_options_that_make_no_sense(program, options, message):
    done = program.script(3, HEAD + f"    Evaluator.create(run, 'mpicomm', {options})\n")
    assert done.returncode != 0
    assert message in done.stderr


def test_an_mpi_without_threads_is_refused(program):
    done = program.script(
        2, HEAD + "    import mpi4py; mpi4py.rc.thread_level = 'serialized'\n    Evaluator.create(run, 'mpicomm')\n"
    )
    assert done.returncode != 0
    assert "MPI_THREAD_MULTIPLE" in done.stderr


def test_without_an_mpi_library_the_error_says_how_to_get_one(program):
    program.env["MPI4PY_LIBMPI"] = "/nowhere/libmpi.so"
    done = program.script(1, HEAD + "    Evaluator.create(run, 'mpicomm')\n")
    assert done.returncode == 1
    assert "pip install 'mpich>=4.2'" in done.stderr


def test_an_evaluator_that_the_root_cannot_create_is_an_error_on_every_rank(program):
    done = program.script(
        3,
        HEAD
        + """
    try:
        Evaluator.create(run, "mpicomm", {"storage": "sqlite:///no/such/folder/s.db"})
    except Exception as exc:
        print(type(exc).__name__, "rank 0 could not create" in str(exc), "no/such/folder" in str(exc))
    with Evaluator.create(run, "mpicomm") as evaluator:
        print("then", evaluator.is_master)
    """,
    )
    assert done.returncode == 0, done.stderr
    assert lines(done) == [
        "BackendError True True",
        "BackendError True True",
        "StorageUnavailableError False True",
        "then False",
        "then False",
        "then True",
    ]


def test_a_module_that_the_workers_cannot_import_is_named(program):
    program.write("here.py", "def f(job): return 1")
    done = program.script(
        2,
        HEAD
        + """
    import importlib.util
    from mpi4py import MPI
    spec = importlib.util.spec_from_file_location("far_away", "here.py")
    if MPI.COMM_WORLD.Get_rank() == 0:
        sys.modules["far_away"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        run = module.f
    with Evaluator.create(run, "mpicomm") as evaluator:
        if evaluator.is_master:
            for _ in range(3):  # each of them hears it, not only the first on a rank
                evaluator.submit([{}])
                print(evaluator.gather("ALL")[0].error)
    """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ModuleNotFoundError") == 3
    assert done.stdout.count("far_away") >= 3


def test_what_mpi_refuses_to_send_fails_its_job_alone(program):
    """Libraries of MPI 3 refuse more than 2 GB: as if they did so at 1 MB."""
    done = program.script(
        3,
        HEAD
        + """
    from mpi4py import MPI

    class Comm(MPI.Intracomm):
        def Isend(self, buf, *args):
            if memoryview(buf[0]).nbytes > 2**20:
                raise MPI.Exception(MPI.ERR_COUNT)
            return super().Isend(buf, *args)

        def Dup(self, info=None):
            return Comm(super().Dup())

    def work(job):
        while job.get("until") and not os.path.exists(job["until"]):
            time.sleep(0.01)
        return bytes(job.get("size", 1))

    with Evaluator.create(work, "mpicomm", {"comm": Comm(MPI.COMM_WORLD)}) as evaluator:
        if evaluator.is_master:
            for size in ({"size": 2**21}, {"data": bytes(2**21)}):
                beside, other = evaluator.submit([{"until": "go"}, {}])
                large = evaluator.submit([size] * 4)
                assert all(job.wait(60) for job in large)
                pathlib.Path("go").touch()
                evaluator.gather("ALL")
                after = evaluator.submit([{}] * 4)
                evaluator.gather("ALL")
                os.remove("go")
                assert all("Invalid count" in str(job.error) for job in large), large[0].error
                assert all(job.is_success for job in (beside, other, *after))
    print("past")
    """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "past\n" * 3


def test_a_job_that_was_given_up_does_not_hold_up_the_end(program):
    done = program.script(
        3,
        HEAD
        + """
    def hang(job):
        time.sleep(job["seconds"])
        return 1

    import warnings
    warnings.simplefilter("ignore")
    with Evaluator.create(hang, "mpicomm", {"job_timeout": 0.5, "grace": 0.1}) as evaluator:
        if evaluator.is_master:
            evaluator.submit([{"seconds": 1000}, {"seconds": 0}])
            print([str(job.cause) for job in evaluator.gather("ALL")])
    """,
    )
    assert done.returncode == 1
    assert "TIMEOUT" in done.stdout
    assert "still runs a job that was given up" in done.stderr


def test_a_script_on_the_root_alone(program):
    program.write("helper.py", "def f(job): return job['x'] + 1")
    text = """
        import sys, helper
        from evalkit import Evaluator
        for kind in (helper.f, lambda job: job["x"] + 1):
            try:
                with Evaluator.create(kind, "mpicomm") as evaluator:
                    evaluator.submit([{"x": x} for x in range(3)])
                    print([job.output for job in evaluator.gather("ALL")], sys.argv)
                    raise KeyError
            except KeyError:
                pass
        not_closed = Evaluator.create(helper.f, "mpicomm")
        sys.exit(5)
    """
    done = program.run(3, sys.executable, "-m", "evalkit_mpi", program.write("script.py", text), "a")
    assert (done.returncode, done.stdout) == (5, "[1, 2, 3] ['script.py', 'a']\n" * 2), done.stderr
    done = program.run(3, sys.executable, "-m", "evalkit_mpi", "-c", "raise SystemError('here')")
    assert done.returncode == 1
    assert "SystemError: here" in done.stderr
    assert "usage:" in program.run(2, sys.executable, "-m", "evalkit_mpi").stderr


def test_the_example_of_the_readme(program):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program.write("script.py", example)
    done = program.run(5, sys.executable, "script.py")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_rank_that_dies_ends_all_and_a_resume_runs_what_is_missing(program):
    program.write(
        "f.py",
        """
        import os, pathlib, signal
        def f(job):
            if job["x"] == 40 and not pathlib.Path("died").exists():
                pathlib.Path("died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return job["x"]
        """,
    )
    grid = "x=" + ",".join(map(str, range(80)))
    command = ("evalkit", "run", "f.py:f", "--grid", grid, "-b", "mpicomm", "--search", "s", "--resume")
    assert program.run(3, *command).returncode not in (0, 75)
    done = program.run(3, *command)
    assert done.returncode == 0, done.stderr
    program.run(1, "evalkit", "export", "s", "-o", "out.jsonl")
    lines = (program.folder / "out.jsonl").read_text().splitlines()
    assert len(lines) == 80
    assert all('"state": "DONE"' in line for line in lines)


# -- the shell --------------------------------------------------------------------------------------------------------


def test_the_shell_on_many_ranks_is_one_run(program):
    program.write("f.py", "def f(job): return job['x'] ** 2")
    done = program.run(3, "evalkit", "run", "f.py:f", "--grid", "x=1,2,3", "-b", "mpicomm")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("search '0' in") == 1
    assert "with 2 workers" in done.stderr
    listed = program.run(1, "evalkit", "ls")
    assert len(listed.stdout.splitlines()) == 2, "one search"


def test_a_shell_that_cannot_start_says_so_once(program):
    program.write("f.py", "def f(job): return 1")
    for arguments, message in (
        (("f.py:g", "--grid", "x=1"), "there is no 'g'"),
        (("f.py:f", "--params", "missing.csv"), "missing.csv"),
        (("f.py:f", "--grid", "x=1", "--storage", "sqlite:///no/folder/s.db"), "no/folder"),
    ):
        done = program.run(3, "evalkit", "run", *arguments, "-b", "mpicomm")
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert done.stderr.count("error:") == 1, done.stderr


def test_a_shell_that_is_told_to_end_does_so_in_good_order(program):
    program.write(
        "f.py",
        """
        import pathlib, time
        def f(job):
            if job["x"] == 0:
                return 0
            pathlib.Path(f"started{job['x']}").touch()
            while not job.stopped():
                time.sleep(0.01)
        """,
    )
    process = program.start(3, "evalkit", "run", "f.py:f", "--grid", "x=0,1,2,3", "-b", "mpicomm")
    try:
        program.wait_for("started1")
        program.wait_for("started2")
        for rank in _ranks_of(process):  # as launchers do
            rank.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=program.bound)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "to resume:" in err
    assert "cancelled 3" in " ".join(out.split()), out


def _ranks_of(process):
    """The processes of the ranks, in order."""
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = {child.environ()["PMI_RANK"]: child for child in children if "PMI_RANK" in child.environ()}
    return [ranks[rank] for rank in sorted(ranks)]


def test_the_exit_code_of_the_shell_is_kept_where_a_job_does_not_end(program):
    program.write("f.py", "import pathlib, time\ndef f(job): pathlib.Path('started').touch(); time.sleep(1000)")
    process = program.start(2, "evalkit", "run", "f.py:f", "--grid", "x=1", "-b", "mpicomm", "--option", "grace=0.1")
    try:
        program.wait_for("started")
        _ranks_of(process)[0].send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=program.bound)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "to resume:" in err
