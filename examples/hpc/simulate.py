"""A simulation that takes its time, for ``search.slurm``."""

import os
import random
import time

SECONDS = float(os.environ.get("SIMULATE_SECONDS", "30"))


def run(job):
    draw = random.Random(job["seed"])
    energy = 0.0
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        energy = min(energy, draw.gauss(0.0, 1.0))
        if job.stopped():  # out of time: what is returned now is not the result, and the job runs again
            break
        time.sleep(SECONDS / 100)
    return energy
