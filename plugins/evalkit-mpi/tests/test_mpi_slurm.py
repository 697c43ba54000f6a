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

    def submit(self, walltime):
        """Run it once, with a walltime that it is told; returns the exit code, None if it was killed then."""
        shutil.rmtree(self.requeued, ignore_errors=True)
        process = self._start({"SLURM_JOB_END_TIME": str(int(time.time() + walltime))})
        try:
            return process.wait(walltime)
        except subprocess.TimeoutExpired:
            _kill(process)
            return None

    def run(self, bound):
        """Run it without a walltime, to its end."""
        return self._start({}).wait(bound)

    def run_into_a_kill(self):
        """Run it, and kill all of it when the first configurations are done."""
        process = self._start({})
        while process.poll() is None and not self.done():
            time.sleep(0.1)
        assert process.poll() is None, self.log
        _kill(process)

    def _start(self, env):
        with open(self.folder / "search.log", "a") as log:
            return subprocess.Popen(
                ["bash", "search.slurm"],
                cwd=self.folder,
                env=self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

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


def _kill(process):
    family = psutil.Process(process.pid).children(recursive=True)
    for one in [*family, process]:
        one.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, 300)  # until they are gone, the search is theirs


@pytest.mark.slow
def test_a_search_that_is_stopped_by_the_walltime_again_and_again_does_each_configuration_once(program):
    slurm = Slurm(program, jobs=60, seconds=0.4)
    walltime, codes, done = 8.0, [slurm.submit(8.0)], [len(slurm.done())]
    assert codes == [75], slurm.log
    while slurm.requeued.exists():
        walltime *= 1.5  # which is enough at some time, however slow the machine
        codes.append(slurm.submit(walltime))
        done.append(len(slurm.done()))
    assert any(0 < number < 60 for number in done), slurm.log
    assert codes == [75] * (len(codes) - 1) + [0], slurm.log
    assert slurm.done() == list(range(60))
    assert "is being run by" not in slurm.log


@pytest.mark.slow
def test_a_search_that_is_killed_at_walltime_is_resumed_by_the_same_line(program):
    slurm = Slurm(program, jobs=30, seconds=0.3)
    slurm.run_into_a_kill()
    before = slurm.done()
    assert 0 < len(before) < 30
    assert slurm.run(program.bound) == 0, slurm.log
    assert slurm.done() == list(range(30))
    assert f"{len(before):,} configurations are done" in slurm.log


def test_the_script_says_what_sbatch_understands():
    text = (EXAMPLE / "search.slurm").read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert subprocess.run(["bash", "-n", os.fspath(EXAMPLE / "search.slurm")], check=False).returncode == 0
