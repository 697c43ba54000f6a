"""What holds for every test: it leaves no rank behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mpi_launching import Program

from evalkit.testing.processes import Mark


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    mark = Mark()
    yield Program(tmp_path, mark)
    deadline = time.monotonic() + 60.0
    while left := mark.processes():
        if time.monotonic() > deadline:
            for process in left:
                process.send_signal(signal.SIGKILL)
            pytest.fail(f"left behind: {left}")
        time.sleep(0.02)
