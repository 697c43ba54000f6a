"""The fault table of docs/reliability.md, run for real: {backends} x {faults} x {what has to hold}.

``EVALKIT_FAULT_TABLE=write pytest tests/faults`` writes what it sees into the page. Otherwise the page has to say it.
"""

from __future__ import annotations

import os
from pathlib import Path

import fault_table
import pytest
from fault_backends import BACKENDS, Backend, Run
from fault_running import observe

_NAMES = [backend.name for backend in BACKENDS]
_RUNS = [pytest.param(backend, run, id=f"{backend.name}-{run.name}") for backend in BACKENDS for run in backend.runs]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "run"), _RUNS)
def test_what_becomes_of_faults_is_what_the_page_says(backend: Backend, run: Run, tmp_path: Path) -> None:
    if backend.missing:
        pytest.skip(f"{backend.missing} is not installed")
    seen = {(backend.name, fault): cells for fault, cells in observe(backend, run, tmp_path).items()}
    if os.environ.get("EVALKIT_FAULT_TABLE") == "write":
        fault_table.write(fault_table.read() | seen, _NAMES)
    assert "RED" not in str(seen), "\n".join(f"{key}: {cells}" for key, cells in seen.items() if "RED" in str(cells))
    there = fault_table.read()
    assert {key: there.get(key) for key in seen} == seen


def test_the_table_has_no_empty_cell_and_no_red_one() -> None:
    table = fault_table.read()
    assert set(table) == {(name, fault) for name in _NAMES for fault in fault_table.FAULTS}
    assert not [key for key, cells in table.items() if fault_table.RED in str(cells) or "''" in str(cells)]
    assert fault_table.part() == fault_table.render(table, _NAMES)


def test_every_fault_is_met_on_every_backend() -> None:
    for backend in BACKENDS:
        assert sorted(fault for run in backend.runs for fault in run.faults) == sorted(fault_table.FAULTS)
