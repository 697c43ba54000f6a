"""kill -9 of `evalkit run` at any instant, again and again: nothing is lost, and next to nothing runs twice."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import pytest

WORKERS = 2

STEADY = """
import os, time

def run(job):
    with open("ran.log", "a") as file:
        file.write(f"{job['x']} {os.getpid()}\\n")
    time.sleep(float(os.environ["SECONDS"]))
    return job["x"]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "seconds"), [(120, 0.05), (4000, 0.0)])
def test_killed_at_any_instant_and_resumed_until_done(shell, jobs, seconds):
    shell.environment["SECONDS"] = str(seconds)
    (shell.folder / "steady.py").write_text(STEADY)
    (shell.folder / "p.jsonl").write_text("".join(f'{{"x": {number}}}\n' for number in range(jobs)))
    command = ("run", "steady.py:run", "--params", "p.jsonl", "-w", str(WORKERS), "--search", "s", "--resume")
    chance = random.Random(20)
    kills = 0
    while True:
        process = shell.start(*command, "--output", "o.jsonl")
        ran = len(shell.ran())
        if kills < 6:
            # At any instant from its start on, in most rounds while jobs run.
            if kills % 4:
                shell.wait_for(lambda before=ran, run=process: len(shell.ran()) > before or run.poll() is not None)
            time.sleep(chance.random() * 0.5)
            process.kill()
        code = process.wait(300)
        told = (shell.folder / "o.jsonl").read_text() if (shell.folder / "o.jsonl").exists() else ""
        if shell.ran():
            shell.wait_for(shell.workers_gone, 5.0)
        kills += code == -9
        if code == 0:
            break
        assert code == -9, process.stderr.read()
        if not told:
            continue  # it was killed before it had a search
        # What was told of is in the storage.
        stored = {job["job_id"]: job["state"] for job in shell.exported("s", "--all")}
        ids = {json.loads(line)["job_id"] for line in told.splitlines() if line.endswith("}")}
        assert {stored[job_id] for job_id in ids} <= {"DONE"}

    records = shell.exported("s")
    assert Counter(job["parameters"]["x"] for job in records) == Counter(range(jobs))
    assert all(job["state"] == "DONE" and job["objective"] == job["parameters"]["x"] for job in records)
    assert kills >= 4
    # All that ran twice is what ran when a kill came.
    assert len(shell.ran()) - jobs <= kills * WORKERS, Counter(shell.ran())
    # And each has one row.
    rows = [json.loads(line) for line in (shell.folder / "o.jsonl").read_text().splitlines()]
    assert Counter(row["parameters"]["x"] for row in rows) == Counter(range(jobs))
