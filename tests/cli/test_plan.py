from pathlib import Path
from typing import Any

import pytest

GIVEN = ("--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl")


@pytest.fixture
def plan(world: Path, unlearn: Any) -> Any:
    def call(*arguments: str) -> Any:
        return unlearn("plan", "npo", *GIVEN, *arguments)

    return call


def test_plan_counts_steps_and_weights_without_loading_any(plan, monkeypatch):
    monkeypatch.setattr("unlearn.models.load_model", lambda *_: pytest.fail("weights were loaded"))
    found = plan("--json", "--set", "training.per_device_train_batch_size=2",
                 "--set", "training.gradient_accumulation_steps=3",
                 "--set", "training.num_train_epochs=5")  # fmt: skip
    assert found.code == 0, found.err
    # 12 forget rows are 6 batches of 2, 2 optimiser steps of 3 batches
    assert found.json["steps"] == {"total": 10, "per_epoch": 2, "effective_batch": 6}
    # two embeddings of 300x32; per layer 4 of 32x32, 3 of 32x48 and 2 norms; one last norm
    total = 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert found.json["parameters"] == {"total": total, "trainable": total}
    assert found.json["memory_bytes"] == sum(part["bytes"] for part in found.json["memory"])
    assert not Path("runs").exists()


def test_plan_for_adapters_trains_less(plan):
    found = plan("--lora", "--json").json["parameters"]
    assert 0 < found["trainable"] < found["total"] / 2


def test_plan_measures_a_step(plan, world):
    before = set(world.rglob("*"))
    measured = plan("--measure", "--json").json["measured"]
    assert measured["seconds_per_step"] > 0
    assert measured["peak_memory_bytes"] > 2**20
    assert set(world.rglob("*")) == before


def test_plan_for_people_fits_the_terminal(plan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = plan().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "optimiser steps" in " ".join(lines)
    for part in ("weights", "gradients", "optimizer", "activations", "head", "total"):
        assert any(line.startswith(part) for line in lines), part


def test_plan_refuses_what_run_refuses(plan):
    outcome = plan("--set", "training.learning_rat=1", "--json")
    assert outcome.code == 2
    assert "did you mean 'training.learning_rate'?" in outcome.json["error"]["message"]
