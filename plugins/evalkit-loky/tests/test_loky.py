"""The loky backend against the suite that all are held to, and what is its own."""

from __future__ import annotations

from evalkit.testing import BackendSuite


class TestLoky(BackendSuite):
    method = "loky"
