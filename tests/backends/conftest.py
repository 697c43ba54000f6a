from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from process_fixtures import Make

from evalkit import Evaluator
from evalkit.testing.backend_fixtures import BOUND, Files, in_background


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Evaluator] = []

    def make(run_function: Callable[..., Any], **kwargs: Any) -> Evaluator:
        made.append(Evaluator.create(run_function, "process", {"grace": 0.2, **kwargs}))
        return made[-1]

    yield make
    for evaluator in made:
        in_background(evaluator.close).result(BOUND)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    files.release_all()
