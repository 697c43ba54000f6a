"""A program whose jobs run while a test looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from victim import Program


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """``start(create, *launcher)`` starts a program, and returns it when its first job runs."""
    started: list[Program] = []

    def start(create: str, *launcher: str) -> Program:
        program = Program(tmp_path, create, *launcher)
        started.append(program)
        program.wait_until_running()
        return program

    yield start
    for program in started:
        program.kill()
