from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from evalkit.cli.output import JSONLinesCallback, json_line, stored_ids
from evalkit.job import Job, JobState


def job(output: object, number: int = 0, args: dict | None = None) -> Job:
    made = Job(f"s.{number}", args or {"x": number}, number=number)
    made.start(1.0)
    made.finish(JobState.DONE, output=output)
    return made


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        ({1: {2, 3}}, {"1": [2, 3]}),
        (b"ab", "b'ab'"),
        (10**5000, hex(10**5000)),
        ({"a": (1, None)}, {"a": [1, None]}),
    ],
    ids=["scalar", "array", "set", "bytes", "long", "tuple"],
)
def test_any_output_is_a_line_of_json(value, expected):
    line = json_line(job(value))
    assert line.count(b"\n") == 1
    assert json.loads(line)["output"] == expected


def test_what_is_not_a_number_stays_that():
    assert math.isnan(json.loads(json_line(job(math.nan)))["objective"])


def test_a_structure_without_end_is_no_trouble():
    loop: list = []
    loop.append(loop)
    assert json.loads(json_line(job(loop)))["job_id"] == "s.0"


def test_a_line_cut_by_a_kill_is_removed(tmp_path: Path):
    path = tmp_path / "o.jsonl"
    first = JSONLinesCallback(path)
    first.on_done(job(1))
    first.on_done(job(2, 1))
    first.on_close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    second = JSONLinesCallback(path)
    second.on_done(job(3, 2))
    second.on_close()
    assert [json.loads(line)["output"] for line in path.read_text().splitlines()] == [1, 3]
    assert stored_ids(str(path)) == {"s.0", "s.2"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can create a file")
def test_a_folder_that_takes_no_files_is_refused_before_anything_runs(shell):
    done = shell("run", "work.py:square", "--grid", "x=1", "-b", "serial", "--output", "/proc/o.csv", code=2)
    assert "--output /proc/o.csv: " in done.stderr
    assert not (shell.folder / "ran.log").exists()
