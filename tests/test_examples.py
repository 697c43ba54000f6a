"""The examples and the benchmarks do what their first lines say, run as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLI = "from evalkit.cli.app import main; main()"


@pytest.fixture
def python(tmp_path):
    """Run an interpreter in a folder of its own, to which the examples were copied."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.db"))
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": search, "PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def objectives(path: Path) -> list[float]:
    return [json.loads(line)["objective"] for line in path.read_text().splitlines()]


def test_quickstart_as_a_program_finds_the_maximum_and_keeps_it(python, tmp_path):
    printed = python("examples/quickstart.py", "--evaluations", "120").splitlines()
    best = float(printed[-2].split()[1])
    assert -0.8 < best <= -0.397
    assert printed[-1].startswith("120 evaluations, search 0 in sqlite:///")
    assert (tmp_path / "quickstart.db").exists()


@pytest.mark.parametrize("backend", ["serial", "thread"])
def test_quickstart_runs_on_other_backends(python, backend):
    printed = python("examples/quickstart.py", "--evaluations", "10", "--backend", backend, "--storage", "memory://")
    assert "10 evaluations" in printed


def test_quickstart_from_the_shell(python, tmp_path):
    grid = ["--grid", "x=-5,0,5,10", "--grid", "y=0,5,10,15", "-b", "process", "-w", "2"]
    python("-c", CLI, "run", "examples/quickstart.py:run", *grid, "--output", "results.jsonl")
    found = objectives(tmp_path / "results.jsonl")
    assert len(found) == 16
    assert max(found) == pytest.approx(-5.9313, abs=1e-4)


def test_the_digits_file_holds_at_least_60_different_configurations():
    lines = (ROOT / "examples" / "digits.csv").read_text().splitlines()
    assert lines[0] == "C,gamma,kernel"
    assert len(set(lines[1:])) == len(lines) - 1 >= 60


@pytest.mark.slow
def test_digits_from_the_shell_gives_the_same_accuracies_every_time(python, tmp_path):
    pytest.importorskip("sklearn")
    lines = (ROOT / "examples" / "digits.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(lines[:5]) + "\n")
    target = ["run", "examples/digits.py:run", "--params", "few.csv", "-b", "process", "-w", "2"]
    for number in (1, 2):
        python("-c", CLI, *target, "--search", f"s{number}", "--output", f"{number}.jsonl")
    first, second = (sorted(objectives(tmp_path / f"{number}.jsonl")) for number in (1, 2))
    assert first == second
    assert len(first) == 4
    assert 0.9 < max(first) < 1.0


@pytest.mark.slow
def test_digits_as_a_program_learns_from_what_came_back(python):
    pytest.importorskip("sklearn")
    printed = python("examples/digits.py", "--evaluations", "12").splitlines()
    assert printed[-1].startswith("12 evaluations in ")
    best = float(printed[-2].split()[4])
    assert 0.95 < best < 1.0


def test_the_overhead_benchmark_measures_and_compares(python, tmp_path):
    benchmark = str(ROOT / "benchmarks" / "overhead.py")
    printed = python(
        benchmark, "--sizes", "20", "60", "--rounds", "1", "--only", "evalkit thread", "evalkit process", "ThreadPool",
        "--json", "overhead.json",
    )  # fmt: skip
    rows = [line.split() for line in printed.splitlines()]
    assert sum(row[:3] == ["ALL", "evalkit", "thread"] for row in rows) >= 2, printed
    assert sum(row[:3] == ["BATCH", "evalkit", "process"] for row in rows) >= 1, printed
    written = json.loads((tmp_path / "overhead.json").read_text())
    assert set(written["samples"]["evalkit process/ALL"]) == {"20", "60"}
    assert {row["what"] for row in written["ratios"]} >= {"evalkit thread"}


def test_the_overhead_benchmark_says_what_there_is():
    benchmark = str(ROOT / "benchmarks" / "overhead.py")
    done = subprocess.run(
        [sys.executable, benchmark, "--only", "nothing-like-it"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "evalkit process/ALL" in done.stderr


def test_the_storage_benchmark_measures(python):
    printed = python(str(ROOT / "benchmarks" / "storage.py"), "--jobs", "40", "--trials", "2", "--rounds", "1")
    assert any(line.startswith("evalkit sqlite") for line in printed.splitlines()), printed


def test_the_transfer_benchmark_measures(python):
    pytest.importorskip("numpy")
    printed = python(str(ROOT / "benchmarks" / "transfer.py"), "--megabytes", "1", "--transfers", "2", "--rounds", "1")
    assert any(line.startswith("evalkit process") for line in printed.splitlines()), printed
