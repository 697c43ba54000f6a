from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from evalkit.callbacks import EarlyStopping
from evalkit.job import Job, JobCause, JobState

Ended = Callable[..., Job]


class Evaluator:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def stop(self, reason: str) -> None:
        self.reasons.append(reason)


def jobs_until_stop(callback: EarlyStopping, jobs: Iterable[Job]) -> int | None:
    """How many jobs it took until the evaluator was stopped; None if it was not. All jobs are delivered."""
    evaluator = Evaluator()
    callback.evaluator = evaluator
    stopped = None
    for count, job in enumerate(jobs, 1):
        callback.on_done(job)
        if evaluator.reasons and stopped is None:
            stopped = count
    assert len(evaluator.reasons) <= 1
    assert (callback.reason is None) == (stopped is None)
    assert evaluator.reasons == ([] if callback.reason is None else [callback.reason])
    return stopped


@pytest.mark.parametrize(
    ("options", "outputs", "stopped"),
    [
        ({"patience": 3}, [1.0, 0.5, 0.5, 0.5, 9.0], 4),
        ({"patience": 3}, [1.0, 0.5, 0.5, 2.0, 1.0, 2.0, 2.0, 5.0], 7),
        ({"patience": 1}, [1.0, 2.0, 3.0], None),
        ({"patience": 1}, [1.0, 1.0], 2),
        ({"patience": 2, "minimize": True}, [5.0, 4.0, 4.5, 3.0, 3.0, 7.0], 6),
        ({"patience": 2}, ["F_oom", math.nan], 2),
        ({"patience": 2}, [1.0, math.inf, -math.inf], 3),
        ({"patience": 2}, [1.0, "F_oom", 2.0, None, "F_oom"], 5),
        ({"patience": 2, "min_delta": 1.0}, [1.0, 1.5, 2.0, 9.0], 3),
        # Small steps add up: 2.1 is more than 1 above the last improvement, 1.0.
        ({"patience": 2, "min_delta": 1.0}, [1.0, 1.6, 2.1, 2.6, 3.1, 3.2], 5),
        ({"threshold": 2.0}, [1.0, 1.9, 2.0], 3),
        ({"threshold": 2.0}, [3.0], 1),
        ({"threshold": 2.0, "minimize": True}, [3.0, 2.5, 2.0], 3),
        ({"threshold": 2.0, "minimize": True}, [-7], 1),
        ({"threshold": 2.0}, [math.inf, "F_x", math.nan, 1.0], None),
        ({"threshold": 0.9, "min_delta": 5.0}, [0.5, 0.8, 0.9], 3),
        ({"threshold": 9.0, "patience": 2}, [1.0, 1.0, 1.0], 3),
        ({"patience": 2}, [{"objective": 1.0}, {"loss": 3}, {"objective": 0.5, "metadata": {}}], 3),
    ],
)
def test_one_objective(ended: Ended, options: dict[str, Any], outputs: list[Any], stopped: int | None) -> None:
    assert jobs_until_stop(EarlyStopping(**options), map(ended, outputs)) == stopped


@pytest.mark.parametrize(
    ("options", "outputs", "stopped"),
    [
        # The second and the fourth enter the front, the third is dominated, and the fifth is there already.
        ({"patience": 2}, [(1, 3), (3, 1), (1, 1), (2, 2), (2, 2), (0, 0)], 6),
        # The reference moves with a bad result: no improvement.
        ({"patience": 2}, [(5, 5), (1, 1), (-9, -9)], 3),
        ({"patience": 2, "minimize": True}, [(1, 3), (3, 1), (4, 4), (2, 2), (3, 3), (2, 2)], 6),
        # Below the reference in one objective: in the front, and no volume.
        ({"patience": 2, "reference": (0, 0)}, [(1, 1), (9, -1), (-1, 9), (2, 2)], 3),
        ({"patience": 1, "reference": (0, 0), "min_delta": 1.0}, [(1, 1), (2, 1.5), (2, 2)], 3),
        ({"threshold": 6.0, "reference": (0, 0)}, [(1, 3), (3, 1), (1.5, 1.5), (2, 2)], 4),
        ({"threshold": 5.0, "reference": (4, 4), "minimize": True}, [(1, 3), (3, 1), (2, 2)], 2),
        # From the worst seen, (0, 0) once the second has come; the volume of the first alone is then 6.
        ({"threshold": 6.0}, [(2, 3), (0, 0), (2, 3), (3, 3)], 4),
        ({"threshold": 6.0, "patience": 2}, [(2, 3), (0, 0), (1, 1)], 3),
        ({"threshold": 8.0, "reference": (0, 0, 0)}, [(1, 1, 1), (2, 2, 2)], 2),
        ({"patience": 2}, [(1, 1), (2, math.nan), "F_x", (3, 3)], 3),
    ],
)
def test_many_objectives(ended: Ended, options: dict[str, Any], outputs: list[Any], stopped: int | None) -> None:
    assert jobs_until_stop(EarlyStopping(**options), map(ended, outputs)) == stopped


def test_failed_and_pruned_jobs_count_and_cancelled_ones_do_not(ended: Ended) -> None:
    jobs = [
        ended(1.0),
        ended(state=JobState.FAILED, cause=JobCause.TIMEOUT),
        ended(state=JobState.CANCELLED, stop_message="enough"),
        ended(9.0, state=JobState.PRUNED),
        ended(state=JobState.CANCELLED),
        ended(state=JobState.FAILED, cause=JobCause.EXCEPTION),
    ]
    assert jobs_until_stop(EarlyStopping(patience=3), jobs) == 6
    assert jobs_until_stop(EarlyStopping(threshold=5.0), jobs) is None


def test_jobs_that_others_ended_count(ended: Ended) -> None:
    callback = EarlyStopping(patience=2)
    evaluator = callback.evaluator = Evaluator()
    callback.on_done(ended(1.0))
    callback.on_done_other(ended(0.5))
    callback.on_done_other(ended(0.5))
    assert evaluator.reasons == ["2 jobs in a row ended without improvement"]


def test_another_number_of_objectives_is_no_improvement(ended: Ended, caplog: pytest.LogCaptureFixture) -> None:
    assert jobs_until_stop(EarlyStopping(patience=1), [ended(1.0), ended((2.0, 2.0))]) == 2
    assert jobs_until_stop(EarlyStopping(patience=1, reference=(0, 0)), [ended(1.0)]) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"threshold": 0.5}, "the objective 0.75 has reached the threshold 0.5"),
        ({"patience": 1}, "1 job ended without improvement"),
    ],
)
def test_the_reason_says_why(ended: Ended, options: dict[str, Any], reason: str) -> None:
    callback = EarlyStopping(**options)
    jobs_until_stop(callback, [ended(0.75), ended(0.75)])
    assert callback.reason == reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs patience"),
        ({"patience": 0}, "patience is a whole number of jobs, 1 or more; got 0"),
        ({"patience": 2.5}, "patience"),
        ({"patience": True}, "patience"),
        ({"threshold": math.nan}, "threshold needs finite numbers"),
        ({"threshold": "0.5"}, "threshold"),
        ({"patience": 1, "min_delta": -0.1}, "min_delta"),
        ({"patience": 1, "min_delta": math.inf}, "min_delta"),
        ({"patience": 1, "reference": (0.0, math.inf)}, "reference needs finite numbers"),
        ({"patience": 1, "reference": (0.0,)}, "two or more objectives"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EarlyStopping(**options)
