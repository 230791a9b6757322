"""The program that kills runs, in small: the run survives, and the program would notice if not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "scripts" / "chaos.py"


def chaos(*options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, PROGRAM, *options, "--json"],
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    return report


def test_a_run_survives_one_kill_of_each_kind() -> None:
    """Seed 1 kills while a checkpoint is written, then asks to stop within a step."""
    report = chaos("--kills", "2", "--steps", "8", "--seed", "1")
    assert report["difference"] == 0.0
    assert [kill["signal"] for kill in report["kills"]] == ["SIGKILL", "SIGTERM"]
    assert [kill["code"] for kill in report["kills"]] == [-9, 75]


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "7"])
def test_twenty_kills_on_one_process(seed: str) -> None:
    report = chaos("--seed", seed)
    assert len(report["kills"]) == 20
    assert report["difference"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_twenty_kills_on_two_processes(engine: str) -> None:
    report = chaos("--nproc", "2", "--engine", engine)
    assert len(report["kills"]) == 20
    assert report["difference"] <= 1e-6
