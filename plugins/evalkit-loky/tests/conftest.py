"""What holds for every test of this plugin: it leaves no process behind but the one that multiprocessing keeps."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from evalkit.testing.backend_fixtures import eventually


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = set(_workers())
    yield
    eventually(lambda: not set(_workers()) - before, "the end of all workers")


def _workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
