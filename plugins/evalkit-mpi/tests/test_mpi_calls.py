"""Which rank gets which call, without any rank."""

from __future__ import annotations

import pickle

import pytest
from evalkit_mpi.calls import Calls


@pytest.fixture
def sent():
    return []


@pytest.fixture
def calls(sent):
    return Calls([1, 2], lambda *call: sent.append(call))


def test_a_call_goes_to_a_rank_that_has_none(calls, sent):
    first, second, third = (calls.submit(7, chunk) for chunk in (b"a", b"b", b"c"))
    assert {rank for rank, _, _ in sent} == {1, 2}
    assert [(number, chunk) for _, number, chunk in sent] == [(7, b"a"), (7, b"b")]
    rank_of_second = sent[1][0]
    calls.answer(rank_of_second, b"B")
    assert sent[2] == (rank_of_second, 7, b"c")
    assert (second.result(0), first.done(), third.done()) == (b"B", False, False)


def test_the_place_is_free_when_the_result_is_told(calls, sent):
    """So what is submitted at once goes at once, and not to a rank that has a call."""
    calls.submit(1, b"long")
    second = calls.submit(1, b"short")
    second.add_done_callback(lambda _: calls.submit(1, b"next"))
    calls.answer(sent[1][0], b"")
    assert [chunk for _, _, chunk in sent] == [b"long", b"short", b"next"]
    assert sent[2][0] == sent[1][0]


def test_a_call_that_is_cancelled_while_it_waits_is_passed_over(calls, sent):
    futures = [calls.submit(1, bytes([i])) for i in range(4)]
    assert (futures[0].cancel(), futures[2].cancel()) == (False, True)
    calls.answer(1, b"")
    calls.answer(2, b"")
    assert [chunk for _, _, chunk in sent] == [b"\x00", b"\x01", b"\x03"]


def test_what_a_call_raised_is_raised(calls, sent):
    future = calls.submit(1, b"a")
    calls.fail(sent[0][0], pickle.dumps(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        future.result(0)


class _Unreadable(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def test_an_exception_that_cannot_be_rebuilt_is_described(calls, sent):
    future = calls.submit(1, b"a")
    calls.fail(sent[0][0], pickle.dumps(_Unreadable(1, 2)))
    with pytest.raises(RuntimeError, match="cannot be read"):
        future.result(0)


def test_the_end_cancels_what_waits_and_lets_the_rest_run(calls, sent):
    futures = [calls.submit(1, b"a") for _ in range(3)]
    calls.end(RuntimeError("closed"), running=False)
    assert [future.cancelled() for future in futures] == [False, False, True]
    calls.answer(sent[0][0], b"A")
    assert futures[0].result(0) == b"A"
    with pytest.raises(RuntimeError, match="closed"):
        calls.submit(1, b"b")


def test_nothing_waits_for_ranks_that_are_lost(calls, sent):
    futures = [calls.submit(1, b"a") for _ in range(3)]
    calls.end(ValueError("MPI failed"), running=True)
    assert [str(future.exception(0)) for future in futures[:2]] == ["MPI failed"] * 2
    assert futures[2].cancelled()
    calls.answer(sent[0][0], b"late")  # and that is no error


class _Strict(list):
    """Refuses what is too large, as MPI libraries do."""

    def send(self, rank, number, chunk):
        if chunk == b"too large":
            raise ValueError("it is refused")
        self.append((rank, number, chunk))


def test_what_mpi_refuses_costs_that_call_and_no_rank():
    sent = _Strict()
    calls = Calls([1, 2], sent.send)
    with pytest.raises(ValueError, match="refused"):
        calls.submit(1, b"too large").result(0)
    futures = [calls.submit(1, chunk) for chunk in (b"a", b"b", b"too large", b"c")]
    assert [chunk for _, _, chunk in sent] == [b"a", b"b"]
    calls.answer(sent[0][0], b"A")
    assert futures[0].result(0) == b"A"
    with pytest.raises(ValueError, match="refused"):
        futures[2].result(0)
    assert [chunk for _, _, chunk in sent] == [b"a", b"b", b"c"]
