"""Damaged checkpoints, and those of another recipe, through the real command: refused, and why."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_resume import stop_at  # noqa: F401 - a fixture
from unlearn.runs import RunFolder

STEPS = ("training.max_steps=6", "training.num_train_epochs=9", "training.save_steps=1",
         "training.save_total_limit=3")  # fmt: skip
CHECKPOINTS = Path("out/checkpoints")


@pytest.fixture
def stopped(world: Path, run_npo: Any, stop_at: Any) -> None:  # noqa: F811
    """Leave a run in ``out`` that was stopped after step 4 with checkpoints 2, 3 and 4."""
    stop_at(signal.SIGTERM, event="step", step=4)
    assert run_npo(*STEPS).code == 75
    assert steps() == [2, 3, 4]


def steps(folder: Path = CHECKPOINTS) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def resumed_from() -> str:
    stages = RunFolder(Path("out")).events("stage")
    return str([event for event in stages if event["stage"] == "train"][-1]["resumed_from"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda at: (at / "model.safetensors").write_bytes(b"cut"),
        "model.safetensors is truncated: 3 bytes of",
    ),
    "one bit": (lambda at: flip(at / "model.safetensors"), "model.safetensors is damaged"),
    "missing": (lambda at: (at / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "not sealed": (lambda at: (at / "complete.json").unlink(), "it has no complete.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_older_one_is_taken_and_the_reason_told(
    damage: str, stopped: None, run_npo: Any, unlearn: Any
) -> None:
    do, why = DAMAGE[damage]
    do(CHECKPOINTS / "checkpoint-4")
    resumed = unlearn("resume", "out", "--json")
    assert resumed.code == 0, resumed.err
    (warning,) = RunFolder(Path("out")).events("warning")
    assert warning["message"].startswith(f"checkpoint-4 is passed over: {why}")
    assert resumed_from() == "checkpoint-3"
    run_npo(*STEPS, out="whole")
    ours, theirs = (load_file(f"{run}/model/model.safetensors") for run in ("out", "whole"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_the_checkpoint_one_asks_for(stopped: None, unlearn: Any) -> None:
    flip(CHECKPOINTS / "checkpoint-3" / "model.safetensors")
    refused = unlearn("resume", "out", "--from", "checkpoint-3")
    assert refused.code == 2
    assert "checkpoint-3 cannot be used: model.safetensors is damaged" in refused.err
    assert "hint: the newest usable one is checkpoint-4" in refused.err
    unknown = unlearn("resume", "out", "--from", "checkpoint-9")
    assert unknown.code == 2
    assert "hint: there are: checkpoint-4, checkpoint-3, checkpoint-2" in unknown.err
    resumed = unlearn("resume", "out", "--from", "checkpoint-2")
    assert resumed.code == 0, resumed.err
    assert resumed_from() == "checkpoint-2"
    assert steps(CHECKPOINTS / "set-aside") == [3, 4]


def test_nothing_but_damaged_ones(stopped: None, unlearn: Any) -> None:
    for step in steps():
        flip(CHECKPOINTS / f"checkpoint-{step}" / "model.safetensors")
    refused = unlearn("resume", "out")
    assert refused.code == 2
    assert "no checkpoint in" in refused.err
    assert "checkpoint-4: model.safetensors is damaged" in refused.err
    assert "remove that folder, and the run starts from its beginning" in refused.err
    assert steps() == [2, 3, 4]


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("learning_rate: 0.001", "learning_rate: 0.002", "learning_rate 0.001, here 0.002"),
        ("seed: 0", "seed: 1", "seed 0, here 1"),
        ("batch_size: 4", "batch_size: 3", "rows_per_step 4, here 3"),
    ],
)
def test_a_checkpoint_of_another_recipe(
    before: str, after: str, why: str, stopped: None, unlearn: Any
) -> None:
    recipe = Path("out/recipe.yaml")
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    refused = unlearn("resume", "out")
    assert refused.code == 2
    assert "it was made with" in refused.err
    assert why in refused.err
    assert steps() == [2, 3, 4]


def test_what_changes_no_step_may_change(stopped: None, unlearn: Any) -> None:
    recipe = Path("out/recipe.yaml")
    text = recipe.read_text().replace("save_steps: 1", "save_steps: 5")
    recipe.write_text(text.replace("max_rows: 4", "max_rows: 2"))
    assert unlearn("resume", "out").code == 0
