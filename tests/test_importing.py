"""A module that creates an evaluator when it is imported: its workers import it too, and theirs, without end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
from evalkit import Evaluator

def run(job):
    return job["x"]

with Evaluator.create(run, {method!r}, {{"num_workers": 2}}) as evaluator:
    evaluator.submit([{{"x": 1}}])
    job, = evaluator.gather("ALL")
    print(job.state, job.error)
"""


SHELL = ["-m", "evalkit", "run", "module.py:run", "--grid", "x=1", "--storage", "null://"]


def _python(folder: Path, method: str, *line: str) -> subprocess.CompletedProcess[str]:
    (folder / "module.py").write_text(MODULE.format(method=method))
    command = [sys.executable, *line]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("method", ["process", "loky"])
def test_its_workers_start_no_others(tmp_path: Path, method: str) -> None:
    if method == "loky":
        pytest.importorskip("evalkit_loky")
    done = _python(tmp_path, method, "-c", "import module")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FAILED")
    assert 'put that under `if __name__ == "__main__":`' in done.stdout


def test_as_a_target_it_is_bad_usage(tmp_path: Path) -> None:
    done = _python(tmp_path, "process", *SHELL)
    assert done.returncode == 2
    assert 'put that under `if __name__ == "__main__":`' in done.stderr
    assert 'module.py", line 7' in done.stderr


def test_one_that_starts_no_workers_may_be_imported(tmp_path: Path) -> None:
    done = _python(tmp_path, "serial", *SHELL)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "DONE None"), done.stderr
