"""One Ray for all tests of a module, since starting one takes seconds."""

from __future__ import annotations

import psutil
import pytest
import ray

from evalkit.testing.backend_fixtures import eventually
from evalkit_ray.session import SessionSettings, join


@pytest.fixture(scope="module")
def local_ray():
    """A local Ray as the backend starts it, which the evaluators of the module then share."""
    before = set(psutil.Process().children(recursive=True))
    session = join(SessionSettings(num_cpus=4))
    yield
    session.leave()
    assert not ray.is_initialized()
    eventually(lambda: not set(psutil.Process().children(recursive=True)) - before, "the end of Ray's processes")
