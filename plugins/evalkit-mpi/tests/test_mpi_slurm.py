"""The Slurm script of the examples, with mpiexec in place of srun and this file in place of sbatch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from mpi_launching import MPIEXEC

from evalkit import JobState
from evalkit.cli.records import iterate, superseded
from evalkit.plugins import plugins

EXAMPLE = Path(__file__).parents[3] / "examples" / "hpc"


class Slurm:
    """What sbatch and its scheduler do with the script: run it for the walltime, then kill it; again if requeued."""

    def __init__(self, program, jobs, seconds):
        for name in ("search.slurm", "simulate.py"):
            shutil.copy(EXAMPLE / name, program.folder)
        self.folder = program.folder
        self.requeued = program.folder / "4711"
        self.env = program.env | {
            "LAUNCH": f"{MPIEXEC} -rmk user -launcher fork -n 3",  # it would look for the Slurm that it seems to be in
            "REQUEUE": "mkdir",  # a folder with the number of the job
            "LAST_SEED": str(jobs - 1),
            "SIMULATE_SECONDS": str(seconds),
            "SLURM_JOB_ID": "4711",
        }

    def submit(self, walltime, *, tells=True):
        """Run it once; returns the exit code, None if it was killed at walltime."""
        shutil.rmtree(self.requeued, ignore_errors=True)
        env = self.env | ({"SLURM_JOB_END_TIME": str(int(time.time() + walltime))} if tells else {})
        with open(self.folder / "search.log", "a") as log:
            process = subprocess.Popen(
                ["bash", "search.slurm"], cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                return process.wait(walltime)
            except subprocess.TimeoutExpired:
                family = psutil.Process(process.pid).children(recursive=True)
                for one in [*family, process]:
                    one.send_signal(signal.SIGKILL)
                process.wait()
                psutil.wait_procs(family, 30)  # until they are gone, the search is theirs
                return None

    @property
    def log(self):
        return (self.folder / "search.log").read_text()

    def done(self):
        """The seeds that are done, as often as they are."""
        if not (self.folder / "search.db").exists():
            return []
        storage = plugins().open_storage(f"sqlite:///{self.folder / 'search.db'}")
        try:
            gone = superseded(storage, storage.load_search("night"))
            records = [record for record in iterate(storage, "night") if record.id not in gone]
        finally:
            storage.close()
        return sorted(record.args["seed"] for record in records if record.state is JobState.DONE)


@pytest.mark.slow
def test_a_search_that_is_stopped_by_the_walltime_again_and_again_does_each_configuration_once(program):
    slurm = Slurm(program, jobs=60, seconds=0.4)
    code = slurm.submit(8.0)
    assert code == 75, slurm.log
    before = slurm.done()
    assert 0 < len(before) < 60, slurm.log
    for _ in range(20):
        if not slurm.requeued.exists():
            break
        code = slurm.submit(12.0)
    assert code == 0, slurm.log
    assert slurm.done() == list(range(60))
    assert "is being run by" not in slurm.log


@pytest.mark.slow
def test_a_search_that_is_killed_at_walltime_is_resumed_by_the_same_line(program):
    slurm = Slurm(program, jobs=30, seconds=0.3)
    for _ in range(20):  # until the kill came in the middle
        assert slurm.submit(3.0, tells=False) is None, slurm.log
        if slurm.done():
            break
    before = slurm.done()
    assert len(before) < 30
    assert slurm.submit(program.bound, tells=False) == 0, slurm.log
    assert slurm.done() == list(range(30))
    assert f"{len(before):,} configurations are done" in slurm.log


def test_the_script_says_what_sbatch_understands():
    text = (EXAMPLE / "search.slurm").read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert subprocess.run(["bash", "-n", os.fspath(EXAMPLE / "search.slurm")], check=False).returncode == 0
