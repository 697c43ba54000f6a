from __future__ import annotations

import json
from collections import Counter

GRID = ("--grid", "x=0,1,2,3,4,5,6,7,8,9")


def test_killed_and_resumed_each_configuration_has_one_result(shell):
    (shell.folder / "p.jsonl").write_text("".join(f'{{"x": {number}}}\n' for number in [*range(30), 7, 7]))
    command = ("run", "work.py:held", "--params", "p.jsonl", "-w", "2", "--search", "s", "--output", "o.csv")
    process = shell.start(*command)
    shell.wait_for((shell.folder / "reached").exists)
    shell.wait_for(lambda: len(shell.ran()) >= 20)
    process.kill()
    process.wait()
    shell.wait_for(shell.workers_gone)  # nothing outlives the master
    done = Counter(job["parameters"]["x"] for job in shell.exported("s"))
    ran_before = len(shell.ran())
    everything = Counter([*range(30), 7, 7])
    assert 5 not in done

    (shell.folder / "go").touch()
    again = shell(*command, "--resume")
    assert f"skipped   {done.total()} that were done before" in again.stdout
    # Exactly what was missing ran.
    assert Counter(shell.ran()[ran_before:]) == everything - done
    jobs = shell.exported("s")
    assert Counter(job["parameters"]["x"] for job in jobs) == everything
    assert all(job["state"] == "DONE" and job["objective"] == job["parameters"]["x"] ** 2 for job in jobs)
    # The rows of --output too, whatever the kill kept from being written.
    _, *rows = (shell.folder / "o.csv").read_text().splitlines()
    assert Counter(int(row.split(",")[0]) for row in rows) == everything
    # All of the records are still there for who asks.
    assert len(shell.exported("s", "--all")) > 32
    # A third time there is nothing to do.
    assert "ran       0 jobs" in shell(*command, "--resume").stdout


def test_killed_and_resumed_without_configurations(shell):
    process = shell.start("run", "work.py:held", *GRID, "-w", "1", "--search", "s")
    shell.wait_for((shell.folder / "reached").exists)
    process.kill()
    process.wait()
    (shell.folder / "go").touch()
    shell("run", "work.py:held", "--resume", "--search", "s", "-w", "1")
    assert [job["parameters"]["x"] for job in shell.exported("s")] == list(range(10))
    assert shell.ran()[-5:] == [5, 6, 7, 8, 9]


def test_a_resume_while_the_first_run_lives_is_refused(shell):
    process = shell.start("run", "work.py:held", *GRID, "-w", "1", "--search", "s")
    shell.wait_for((shell.folder / "reached").exists)
    err = shell("run", "work.py:held", *GRID, "--search", "s", "--resume", code=2).stderr
    assert f"is being run by process {process.pid}" in err
    (shell.folder / "go").touch()
    assert process.wait(300) == 0
    assert len(shell.exported("s")) == 10


def test_a_search_that_exists_needs_resume(invoke):
    run = ("run", "work.py:square", "--grid", "x=1,2", "--search", "s", "-b", "serial")
    assert invoke(*run).exit_code == 0
    again = invoke(*run)
    assert again.exit_code == 2
    assert "continue it with --resume" in again.stderr
    assert "skipped   2" in invoke(*run, "--resume").stdout


def test_the_same_line_every_time_starts_and_resumes(invoke):
    run = ("run", "work.py:square", "--grid", "x=1,2", "-b", "serial", "--resume")
    assert "nothing to resume: starting search '0'" in invoke(*run).stderr
    assert "skipped   2" in invoke(*run).stdout
    # Other configurations are another search.
    other = ("run", "work.py:square", "--grid", "x=1,2,3", "-b", "serial", "--resume")
    assert "starting search '1'" in invoke(*other).stderr
    # A name that is nearly one that is there is started too, and said.
    named = ("run", "work.py:square", "--grid", "x=1", "-b", "serial", "--search")
    assert invoke(*named, "sweep").exit_code == 0
    assert "did you mean 'sweep'?" in invoke(*named, "sweeep", "--resume").stderr


def test_a_seed_that_was_not_given_is_kept(invoke):
    run = ("run", "work.py:square", "--space", "x=0:1", "-b", "serial", "--search", "s")
    assert invoke(*run, "--random", "5").exit_code == 0
    again = invoke(*run, "--random", "8", "--resume")
    assert "skipped   5" in again.stdout
    assert "ran       3 jobs" in again.stdout
    other = invoke(*run, "--random", "8", "--seed", "1", "--resume")
    assert other.exit_code == 2
    assert "was started with --seed" in other.stderr


def test_what_failed_is_done_unless_asked(invoke):
    run = ("run", "work.py:flaky", "--grid", "x=1,2", "-b", "serial", "--search", "s")
    with open("work.py", "a") as file:
        file.write("\ndef flaky(job):\n    return 1 if os.path.exists('go') else 1 / 0 if job['x'] == 1 else 'F_no'\n")
    assert invoke(*run).exit_code == 1
    again = invoke(*run, "--resume")
    assert again.exit_code == 1  # two of its configurations have no result
    assert "2 of them failed" in again.stderr
    open("go", "w").close()
    third = invoke(*run, "--resume", "--retry-failed")
    assert third.exit_code == 0, third.output
    assert invoke("export", "s", "--output", "e.jsonl").exit_code == 0
    with open("e.jsonl") as file:
        assert [json.loads(line)["objective"] for line in file] == [1, 1]
    assert "\t2\t0\t0\t2\t0\t" in invoke("ls").stdout


def test_a_kill_between_the_note_and_the_jobs_loses_none(invoke):
    """A resume notes the jobs that count no more, then creates their successors: without successors, they count."""
    from evalkit.cli.records import SUPERSEDED
    from evalkit.storage import SQLStorage

    storage = SQLStorage.from_url("sqlite:///evalkit.db")
    storage.create_search("s")
    storage.create_jobs("s", [{"x": 1}, {"x": 2}])
    storage.set_value("s", f"{SUPERSEDED}0", {"ids": {"s.0": "CANCELLED", "s.1": "CANCELLED"}, "jobs": 2})
    storage.close()
    assert invoke("run", "work.py:square", "--resume", "--search", "s", "-b", "serial").exit_code == 0
    assert invoke("export", "s", "--output", "e.jsonl").exit_code == 0
    with open("e.jsonl") as file:
        assert [json.loads(line)["objective"] for line in file] == [1, 4]
