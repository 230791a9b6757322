"""Processes are started, stopped together, and it is known how each of them ended."""

import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unlearn import launch
from unlearn.errors import RunFailed, UserError
from unlearn.launch import Launch, Outcome

PROGRAM = (str(Path(__file__).with_name("stand_in.py")),)
TWO = Launch(nproc=2)


def test_success() -> None:
    assert launch.start(TWO, ["finish"], program=PROGRAM).code == 0


def test_a_failure_is_told_with_its_rank_and_cause() -> None:
    outcome = launch.start(TWO, ["fail"], program=PROGRAM)
    assert (outcome.rank, outcome.code) == (1, 1)
    assert (outcome.message, outcome.hint) == ("the disk is full", "free some space")


def test_a_killed_process_is_named_and_ends_the_others() -> None:
    begun = time.monotonic()
    outcome = launch.start(TWO, ["killed"], program=PROGRAM)
    assert time.monotonic() - begun < 30
    assert (outcome.rank, outcome.code) == (1, 1)
    assert outcome.message.startswith(f"rank 1 (process {outcome.pid} on ")
    assert outcome.message.endswith("was killed by SIGKILL")


def test_a_frozen_process_is_killed(monkeypatch: Any) -> None:
    monkeypatch.setattr(launch, "END_SECONDS", 2)
    begun = time.monotonic()
    assert launch.start(TWO, ["frozen"], program=PROGRAM).code == 1
    assert time.monotonic() - begun < 25


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_reaches_every_process_and_all_may_finish(
    number: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def ask() -> None:
        while len([path for path in tmp_path.glob("*/pid-*") if path.read_text()]) < 2:
            time.sleep(0.1)
        time.sleep(1)  # its handler comes just after
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    outcome = launch.start(TWO, ["wait"], program=PROGRAM)
    assert (outcome.code, outcome.message) == (75, "stopped")


def test_nodes_that_do_not_meet_are_told(monkeypatch: Any) -> None:
    """Nobody listens at port 1 of a host that is not this one."""
    monkeypatch.setattr(launch, "MEET_SECONDS", 1)
    apart = Launch(nnodes=2, rdzv="192.0.2.1:1")  # an address kept for documentation
    with pytest.raises(RunFailed, match=r"2 nodes did not meet at 192\.0\.2\.1:1"):
        launch.start(apart, ["finish"], program=PROGRAM)


def failure(exitcode: int, seconds: int) -> Any:
    return SimpleNamespace(exitcode=exitcode, timestamp=seconds, pid=7)


def ended(rank: int, code: int, seconds: float) -> Outcome:
    return Outcome(rank, "host", 1, code, f"rank {rank} said {code}", time=seconds)


@pytest.mark.parametrize(
    ("found", "failures", "expected"),
    [
        ([ended(0, 0, 1), ended(1, 0, 1)], {}, "rank 0 said 0"),
        ([ended(0, 75, 1), ended(1, 75, 2)], {}, "rank 0 said 75"),
        ([ended(0, 1, 9), ended(1, 1, 8)], {}, "rank 1 said 1"),  # the first to fail
        ([ended(0, 2, 9), ended(1, 1, 8)], {}, "rank 0 said 2"),  # a mistake explains the rest
        # rank 0 lost its connection just after rank 1 was killed
        ([ended(0, 1, 8.2)], {0: failure(1, 8), 1: failure(-9, 8)}, "killed by SIGKILL"),
        # rank 1 failed, the launcher ended rank 0
        ([ended(1, 1, 8)], {0: failure(-15, 8), 1: failure(1, 8)}, "rank 1 said 1"),
        ([ended(1, 1, 8)], {0: failure(-9, 38), 1: failure(1, 8)}, "rank 1 said 1"),
        # rank 1 failed, rank 0 lost its connection and could say nothing
        ([ended(1, 1, 8)], {0: failure(1, 8), 1: failure(1, 8)}, "rank 1 said 1"),
        ([ended(0, 75, 9)], {1: failure(1, 8)}, "rank 1 (process 7"),
    ],
)
def test_the_cause_is_told_from_its_consequences(
    found: list[Outcome], failures: dict[int, Any], expected: str
) -> None:
    assert expected in launch._whole(found, failures).message


def test_nodes_must_know_where_to_meet() -> None:
    with pytest.raises(UserError, match="2 nodes given"):
        Launch(nnodes=2)
    assert Launch(nnodes=2, rdzv="one:29500").rdzv == "one:29500"
