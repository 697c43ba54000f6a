"""The conformance suite, run on the root of an MPI program whose other ranks serve evaluator after evaluator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "suite.py"
THREE_WORKERS = "test_as_many_run_at_once_as_there_are_workers"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tests"), [(3, f"not {THREE_WORKERS}"), (4, THREE_WORKERS)])
def test_the_suite(program, ranks, tests):
    program.bound = 800.0
    pytest_command = ["-m", "pytest", str(SUITE), "-q", "-k", tests, "--timeout=300", "-p", "no:cacheprovider", "-n0"]
    done = program.run(ranks, sys.executable, "-m", "evalkit_mpi", *pytest_command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
