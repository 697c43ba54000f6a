"""The conformance suite on ``mpicomm``; :mod:`test_mpi_conformance` runs it under mpiexec."""

from __future__ import annotations

import sys
from pathlib import Path

from evalkit.testing import BackendSuite


class TestMPIComm(BackendSuite):
    method = "mpicomm"

    def command(self, script: Path) -> list[str]:
        return ["mpiexec", "-n", "3", sys.executable, "-m", "evalkit_mpi", str(script)]
