"""The ray backend against the suite that all are held to."""

from __future__ import annotations

import pytest

from evalkit.testing import BackendSuite

pytestmark = pytest.mark.usefixtures("local_ray")


class TestRay(BackendSuite):
    method = "ray"
    says_how_workers_die = False  # Ray does not tell
    kills_children = False  # Ray ends the children of a worker, and not those that have left it as daemons
