"""Tune a support vector classifier on the images of digits that come with scikit-learn (`pip install scikit-learn`).

From the shell, over the 64 configurations of a CSV file, on two worker processes:

    evalkit run examples/digits.py:run --params examples/digits.csv -b process -w 2

As a program, a search that proposes the next configuration from what came back, by mutating one of the best:

    python examples/digits.py --workers 2 --evaluations 64
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from sklearn.datasets import load_digits
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.svm import SVC

from evalkit import Evaluator, Job, RunningJob

Configuration = dict[str, Any]


IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES /= 16.0
FOLDS = list(RepeatedStratifiedKFold(n_splits=10, n_repeats=2, random_state=0).split(IMAGES, LABELS))


def run(job: RunningJob) -> dict[str, Any]:
    """The accuracy of one configuration, ten-fold cross-validated, twice: the same at every run."""
    scores = []
    for number, (train, test) in enumerate(FOLDS, 1):
        model = SVC(C=job["C"], gamma=job["gamma"], kernel=job["kernel"]).fit(IMAGES[train], LABELS[train])
        scores.append(float(model.score(IMAGES[test], LABELS[test])))
        if job.report(number / len(FOLDS), f"fold {number}"):
            break  # asked to stop
    return {"objective": statistics.fmean(scores), "metadata": {"std": statistics.pstdev(scores)}}


def draw(rng: random.Random) -> Configuration:
    """Any configuration."""
    return {
        "C": round(10 ** rng.uniform(-1, 3), 3),
        "gamma": round(10 ** rng.uniform(-3, 0), 5),
        "kernel": rng.choice(["rbf", "poly"]),
    }


def mutate(configuration: Configuration, rng: random.Random) -> Configuration:
    """One like this one: both numbers moved by a factor, and now and then the other kernel."""
    return {
        "C": round(min(1000.0, max(0.1, configuration["C"] * 10 ** rng.gauss(0, 0.4))), 3),
        "gamma": round(min(1.0, max(0.001, configuration["gamma"] * 10 ** rng.gauss(0, 0.3))), 5),
        "kernel": draw(rng)["kernel"] if rng.random() < 0.1 else configuration["kernel"],
    }


def propose(population: list[Job], rng: random.Random) -> Configuration:
    """At first anything; then a mutation of one of the best, and now and then anything again."""
    if len(population) < 5 or rng.random() < 0.1:
        return draw(rng)
    return mutate(rng.choice(population).args, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune a classifier of digits by evolution.")
    parser.add_argument("--backend", default="process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", default="sqlite:///digits.db")
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = random.Random(options.seed)
    population: list[Job] = []  # the five best so far
    start = time.monotonic()
    settings = {"num_workers": options.workers, "storage": options.storage}
    with Evaluator.create(run, options.backend, settings) as evaluator:
        evaluator.submit([propose(population, rng) for _ in range(min(options.workers, options.evaluations))])
        while jobs := evaluator.gather("BATCH", 1):
            for job in jobs:
                if not job.is_success:
                    print(f"{job.id} {job.state}: {job.error}")
                    continue
                if not population or job.objective > population[0].objective:
                    seconds = time.monotonic() - start
                    print(f"{seconds:5.1f} s  {evaluator.num_jobs_gathered:3} done  {job.objective:.4f}  {job.args}")
                population = sorted([*population, job], key=lambda one: one.objective, reverse=True)[:5]
            left = options.evaluations - evaluator.num_jobs_submitted
            evaluator.submit([propose(population, rng) for _ in range(min(len(jobs), left))])
    seconds = time.monotonic() - start
    print(f"{evaluator.num_jobs_gathered} evaluations in {seconds:.1f} s on {options.workers} workers")


if __name__ == "__main__":
    main()
