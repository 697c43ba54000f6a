from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import pytest


def test_version_and_help_load_nothing_heavy(shell):
    assert shell("--version").stdout.startswith("evalkit 0.")
    code = (
        "import sys; from evalkit.cli.app import create_app; sys.argv = ['evalkit', 'run', '--help']\n"
        "try: create_app()()\nexcept SystemExit: pass\n"
        "print([name for name in ('sqlalchemy', 'numpy', 'tqdm', 'rich.live') if name in sys.modules])"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=shell.environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--grid NAME=V1,V2,…" in done.stdout


def test_a_grid_runs_and_is_kept(shell):
    done = shell("run", "work.py:square", "--grid", "x=1,2,3", "-w", "2", "--search", "s")
    assert "best      9  job s.2  x=3" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert [job["objective"] for job in shell.exported("s")] == [1, 4, 9]
    with sqlite3.connect(shell.folder / "evalkit.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def test_each_kind_of_failure_is_told_and_the_code_is_1(shell):
    done = shell("run", "work.py:troubled", "--grid", "x=1,2,3,4,5", "-w", "2", "--minimize", code=1)
    for words in ("failed    4", "EXCEPTION 1  job", "ValueError: no ones", "CRASH 1", "exited with code 3"):
        assert words in done.stdout
    assert "F_three 1" in done.stdout
    assert "NaN 1" in done.stdout
    assert "best      5" in done.stdout


def test_a_missing_result_alone_is_a_failure(shell):
    shell("run", "work.py:troubled", "--grid", "x=3", "-b", "serial", "--storage", "null://", code=1)
    shell("run", "work.py:troubled", "--grid", "x=4", "-b", "serial", "--storage", "null://", code=1)


def test_keyword_arguments_files_and_outputs(shell):
    (shell.folder / "p.csv").write_text("x,y\n1,2\n3,4\n")
    for output in ("o.csv", "o.jsonl"):
        shell("run", "work.py:multiply", "--kwargs", "--params", "p.csv", "-b", "thread", "--output", output, "-q")
    header, *rows = (shell.folder / "o.csv").read_text().splitlines()
    assert header.startswith("p:x,p:y,objective,search_id,job_id,job_status,m:")
    assert sorted(row.split(",")[:3] for row in rows) == [["1", "2", "2"], ["3", "4", "12"]]
    jobs = [json.loads(line) for line in (shell.folder / "o.jsonl").read_text().splitlines()]
    assert sorted(job["objective"] for job in jobs) == [2, 12]
    assert jobs[0]["state"] == "DONE"


def test_quiet_says_nothing(shell):
    done = shell("run", "work.py:square", "--grid", "x=1", "-b", "serial", "-q")
    assert (done.stdout, done.stderr) == ("", "")


def test_random_draws_are_repeatable(shell):
    for name in "ab":
        args = ("--random", "5", "--space", "x=1:100:int", "--seed", "3", "--search", name, "-b", "serial")
        shell("run", "work.py:square", *args)
    first, second = ([job["parameters"] for job in shell.exported(name)] for name in "ab")
    assert first == second


def test_jobs_start_while_standard_input_is_open(shell):
    process = shell.start("run", "work.py:square", "--params", "-", "-w", "1", stdin=subprocess.PIPE)
    process.stdin.write('{"x": 7}\n')
    process.stdin.flush()
    shell.wait_for(lambda: shell.ran() == [7])
    out, _ = process.communicate('{"x": 8}', timeout=300)
    assert process.returncode == 0
    assert shell.ran() == [7, 8]
    assert "done      2" in out


def test_a_bad_line_far_down_a_stream_loses_nothing(shell):
    lines = [json.dumps({"x": number}) for number in range(50)] + ["[]"]
    done = shell("run", "work.py:square", "--params", "-", "-w", "2", "--search", "s", stdin="\n".join(lines), code=2)
    assert "standard input, line 51: each line is a JSON object" in done.stderr
    assert sorted(job["parameters"]["x"] for job in shell.exported("s")) == list(range(50))


def test_many_jobs_leave_few_lines(shell):
    (shell.folder / "p.jsonl").write_text("".join(f'{{"x": {number}}}\n' for number in range(20_000)))
    (shell.folder / "quick.py").write_text("def run(job):\n    return job['x']\n")
    done = shell("run", "quick.py:run", "--params", "p.jsonl", "-w", "2", "--storage", "null://", "--output", "o.jsonl")
    assert "done      20,000" in done.stdout
    assert len(done.stderr.splitlines()) < 10
    assert len((shell.folder / "o.jsonl").read_text().splitlines()) == 20_000


def test_the_end_of_the_time_is_told(shell):
    done = shell("run", "work.py:polite", "--grid", "x=5,6", "-w", "1", "--timeout", "0.5", "--search", "s", code=1)
    assert "not every configuration was run: the timeout of 0.5 s has passed" in done.stderr
    assert "to resume: evalkit run work.py:polite" in done.stderr
    (shell.folder / "go").touch()
    shell("run", "work.py:polite", "--grid", "x=5,6", "-w", "1", "--search", "s", "--resume")
    assert [job["objective"] for job in shell.exported("s")] == [25, 36]


def test_a_job_that_takes_too_long_fails(shell):
    args = ("--grid", "x=5,6", "-w", "2", "--job-timeout", "0.3", "--option", "grace=0.2")
    assert "TIMEOUT 1" in shell("run", "work.py:held", *args, code=1).stdout


BAD = [
    (["--grid", "x=1", "--params", "p.csv"], "--params and --grid"),
    ([], "say what to run"),
    (["--space", "x=0:1"], "--random N"),
    (["--random", "3"], "--space"),
    (["--random", "0", "--space", "x=0:1"], "at least 1"),
    (["--grid", "x=1", "--seed", "1"], "--seed is for --random"),
    (["--grid", "x=1", "-b", "proces"], "did you mean 'process'"),
    (["--grid", "x=1", "--storage", "redis://localhost"], "no storage for redis:// is installed"),
    (["--grid", "x=1", "-b", "serial", "--option", "foo=1"], "no option 'foo'"),
    (["--grid", "x=1", "--option", "foo"], "KEY=VALUE"),
    (["--grid", "x=1", "--option", "num_workers=2"], "use --workers"),
    (["--grid", "x=1", "--workers", "0"], "at least 1"),
    (["--grid", "x=1", "--timeout", "0"], "--timeout"),
    (["--grid", "x=1", "--job-timeout", "nan"], "--job-timeout"),
    (["--grid", "x=1", "--retries", "-1"], "retries"),
    (["--grid", "x=1", "--storage", "sqlit:///x.db"], "did you mean 'sqlite'"),
    (["--grid", "x=1", "--storage", "x.db"], "sqlite:///x.db"),
    (["--grid", "x=1", "--storage", "sqlite:////no/such/folder/x.db"], "/no/such/folder"),
    (["--grid", "x=1", "--storage", "sqlite:///work.py"], "not a"),
    (["--grid", "x=1", "--output", "o.txt"], ".csv or a .jsonl"),
    (["--grid", "x=1", "--output", "nowhere/o.csv"], "no folder"),
    (["--grid", "x=1", "--output", "other.csv"], "cannot append"),
    (["--grid", "x=1", "--output", "other.jsonl"], "cannot append"),
    (["--grid", "x=1", "--retry-failed"], "--resume"),
    (["--grid", "x=1", "--storage", "memory://", "--resume"], "keeps results"),
    (["--resume", "--search", "nope"], "no search 'nope'"),
    (["--grid", "x=1", "--search", ""], "search id"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_usage_is_told_and_leaves_no_search(invoke, args, message):
    for name in ("other.csv", "other.jsonl"):
        with open(name, "w") as file:
            file.write("not ours\n1\n")
    result = invoke("run", "work.py:square", *args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    listed = invoke("ls")
    assert len(listed.stdout.splitlines()) <= 1


def test_csv_on_standard_input_is_refused_and_leaves_no_search(shell):
    done = shell("run", "work.py:square", "--params", "-", "-w", "1", stdin="x,y\n1,2\n", code=2)
    assert "standard input, line 1: this is not JSON" in done.stderr
    assert "to resume" not in done.stderr
    assert len(shell("ls").stdout.splitlines()) == 1


def test_resources_are_given_out_and_bad_ones_refused(shell):
    shell("run", "work.py:square", "--grid", "x=1,2,3", "-b", "thread", "--resource", "gpu=0,1", "--search", "s", "-q")
    assert {job["metadata"]["resources"]["gpu"] for job in shell.exported("s")} <= {"0", "1"}
    for words, said in (
        (["gpu"], "write KIND=UNIT,UNIT"),
        (["gpu=0,0"], "more than once"),
        (["gpu="], "units of resources['gpu']"),
        (["gpu=0", "--resource", "gpu=1"], "given before"),
    ):
        done = shell("run", "work.py:square", "--grid", "x=1", "--resource", *words, code=2)
        assert said in " ".join(done.stderr.split())
    done = shell("run", "work.py:square", "--grid", "x=1", "--option", "resources=1", code=2)
    assert "--resource" in done.stderr
