"""Quickstart: find the maximum of a function of two variables, with nothing but evalkit.

From the shell, over a grid or over random draws:

    evalkit run examples/quickstart.py:run --grid x=-5,0,5,10 --grid y=0,5,10,15 -b process -w 2
    evalkit run examples/quickstart.py:run --space x=-5:10 --space y=0:15 --random 100 -b process -w 2

As a program, where a loop looks at what came back before it says what to try next:

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import math
import random
import time

from evalkit import Evaluator, Job, RunningJob


def run(job: RunningJob) -> float:
    """Branin's function, turned over: three maxima of -0.398. The sleep stands for your training or simulation."""
    x, y = job["x"], job["y"]
    time.sleep(0.005)
    valley = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return -(valley**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10)


def propose(best: Job | None, rng: random.Random) -> dict[str, float]:
    """Half of the time anywhere, half of the time near the best point so far."""
    if best is None or rng.random() < 0.5:
        return {"x": rng.uniform(-5, 10), "y": rng.uniform(0, 15)}
    return {
        "x": min(10.0, max(-5.0, rng.gauss(best.args["x"], 0.5))),
        "y": min(15.0, max(0.0, rng.gauss(best.args["y"], 0.5))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Maximise Branin's function.")
    parser.add_argument("--backend", default="process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", default="sqlite:///quickstart.db")
    parser.add_argument("--evaluations", type=int, default=200)
    options = parser.parse_args()

    rng = random.Random(1)
    best: Job | None = None
    settings = {"num_workers": options.workers, "storage": options.storage}
    with Evaluator.create(run, options.backend, settings) as evaluator:
        evaluator.submit([propose(None, rng) for _ in range(options.workers)])
        while jobs := evaluator.gather("BATCH", 1):
            for job in jobs:
                # A job that failed is a result too: it has an error instead of an objective.
                if job.is_success and (best is None or job.objective > best.objective):
                    best = job
                    print(f"{job.id:>6}  {job.objective:9.4f}  at x={job.args['x']:.3f}, y={job.args['y']:.3f}")
            left = options.evaluations - evaluator.num_jobs_submitted
            evaluator.submit([propose(best, rng) for _ in range(min(len(jobs), left))])
        print(f"{evaluator.num_jobs_gathered} evaluations, search {evaluator.search_id} in {evaluator.storage.url}")


if __name__ == "__main__":
    main()
