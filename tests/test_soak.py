"""The soak, in small: what it says of itself is what it exits with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_SOAK = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_a_small_soak_finds_nothing_wrong() -> None:
    command = [sys.executable, str(_SOAK), "--jobs", "300", "--kills", "2", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300" in done.stdout
