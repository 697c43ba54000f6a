"""What the messages of a session are: the tag of each has its kind, and the number of its evaluator."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["END_TAG", "STOP_TAG", "Kind", "kind_of", "tag"]

#: To a rank, of no evaluator: pairs of an evaluator and a run of its that is to stop.
STOP_TAG = 0
#: To a rank, of no evaluator: no calls come any more.
END_TAG = 1


class Kind(IntEnum):
    """Of the messages of one evaluator; those have numbers from 1 on."""

    PROGRAM = 0  #: to a rank, before the first call
    CALL = 1  #: to a rank that has none
    ANSWER = 2  #: to the root: what a call returned
    FAILURE = 3  #: to the root: the exception that a call raised
    SAID = 4  #: to the root: what a job says while it runs


def tag(number: int, kind: Kind) -> int:
    return len(Kind) * number + kind


def kind_of(tag: int) -> tuple[int, Kind]:
    """The number of the evaluator, and the kind."""
    number, kind = divmod(tag, len(Kind))
    return number, Kind(kind)
