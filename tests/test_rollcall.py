"""Who is silent for too long is named; who has ended is not."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import distributed

from unlearn import rollcall
from unlearn.rollcall import RollCall


@pytest.fixture
def clock(monkeypatch: Any) -> Iterator[list[float]]:
    """Give the time in a list: tests turn it."""
    now = [100.0]
    monkeypatch.setattr(rollcall.time, "monotonic", lambda: now[0])
    return now


def calls(clock: list[float], size: int = 3) -> list[RollCall]:
    store = distributed.HashStore()
    return [RollCall(store, rank, size, lost_after=30) for rank in range(size)]


def test_nobody_is_missing_while_all_beat(clock: list[float]) -> None:
    everyone = calls(clock)
    for _ in range(20):
        clock[0] += 5
        assert [one.round() for one in everyone][1:] == [None, None]
    assert everyone[0].round() is None


def test_the_silent_rank_is_named_by_all_others(clock: list[float]) -> None:
    everyone = calls(clock)
    for one in everyone * 2:
        assert one.round() is None
    for _ in range(8):  # its last beat is heard in the first of these rounds
        clock[0] += 5
        said = [everyone[0].round(), everyone[1].round()]
    assert all(text and text.startswith("rank 2 (") for text in said)
    assert all("nothing heard for 35 s" in str(text) for text in said)


def test_a_rank_that_never_came_is_missed_too(clock: list[float]) -> None:
    first = calls(clock, size=2)[0]
    assert first.round() is None
    clock[0] += 31
    assert str(first.round()).startswith("rank 1 (its host has not been heard) is lost")


def test_who_has_ended_may_be_silent(clock: list[float]) -> None:
    one, other = calls(clock, size=2)
    other.beat()
    assert one.round() is None
    other.end()
    clock[0] += 500
    assert one.round() is None


def test_a_store_that_does_not_answer_is_a_lost_node(clock: list[float]) -> None:
    class Gone:
        def set(self, *_: Any) -> None:
            raise distributed.DistNetworkError("connection closed")

    one = RollCall(Gone(), 0, 2, lost_after=30)
    assert one.round() is None
    clock[0] += 31
    assert "where the ranks meet is lost: no answer for 31 s" in str(one.round())
