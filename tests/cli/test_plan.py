import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.cli.plan import signed

GIVEN = ("--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl")
TOO_SMALL = ("--device-memory", "0.01")


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
    steps = {"total": 10, "per_epoch": 2, "effective_batch": 6}
    assert found.json["steps"] == steps | {"per_device": 2, "accumulation": 3, "processes": 1}
    # two embeddings of 300x32; per layer 4 of 32x32, 3 of 32x48 and 2 norms; one last norm
    total = 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert found.json["parameters"] == {"total": total, "trainable": total}
    assert found.json["memory_bytes"] == sum(part["bytes"] for part in found.json["memory"])
    assert found.json["fit"]["fits"]
    assert not Path("runs").exists()


def test_plan_for_adapters_trains_less(plan):
    found = plan("--lora", "--json").json["parameters"]
    assert 0 < found["trainable"] < found["total"] / 2


def test_plan_measures_a_step(plan, world):
    before = set(world.rglob("*"))
    measured = plan("--measure", "--json").json["measured"]
    assert measured["processes"] == 1
    assert measured["steps_per_second"] == pytest.approx(1 / measured["seconds_per_step"])
    assert measured["tokens_per_second"] == measured["tokens_per_second_per_device"] > 0
    assert measured["peak_memory_bytes"] > 2**20
    assert set(world.rglob("*")) == before


def test_plan_measures_one_process_of_several_and_says_so(plan):
    printed = plan("--measure", "--nproc", "2", "--set", "training.global_batch_size=16").out
    assert "16 forget rows per step: 8 at once x 1 pass x 2 processes" in printed
    assert "measured with one process" in printed
    assert "what they send each other comes on top" in " ".join(printed.split())


def test_plan_for_people_fits_the_terminal(plan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = plan("--nproc", "8", "--engine", "zero2", "--device-memory", "80").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "optimiser steps" in " ".join(lines)
    for part in ("weights", "gradients", "fp32 copy", "optimizer", "activations", "head", "total",
                 "measuring", "all-reduce of gradients", "✓ fits each device"):  # fmt: skip
        assert any(line.startswith(part) for line in lines), part


def test_plan_refuses_what_run_refuses(plan):
    outcome = plan("--set", "training.learning_rat=1", "--json")
    assert outcome.code == 2
    assert "did you mean 'training.learning_rate'?" in outcome.json["error"]["message"]


def test_a_plan_that_cannot_fit_is_shown_and_refused(plan):
    outcome = plan(*TOO_SMALL)
    assert outcome.code == 2
    assert "✗ does not fit each device" in outcome.out
    (error,) = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert "0.01" not in error
    assert "are there (largest part: " in error
    assert "launch.device_memory" in outcome.err


def test_a_refused_plan_is_one_json_object_with_its_error(plan, monkeypatch):
    monkeypatch.setattr("unlearn.recipes.plan.measure_step", lambda *_: pytest.fail("measured"))
    outcome = plan(*TOO_SMALL, "--json", "--measure")
    assert outcome.code == 2
    found = json.loads(outcome.out)
    assert not found["fit"]["fits"]
    assert found["error"]["exit_code"] == 2
    assert found["error"]["message"] in outcome.err


def test_memory_given_on_the_command_line_is_the_recipes_key(plan):
    option = plan("--device-memory", "3", "--json").json["fit"]
    key = plan("--set", "launch.device_memory=3", "--json").json["fit"]
    assert option == key
    assert option["checks"][0]["available_bytes"] == 3 * 2**30
    assert plan("--device-memory", "0").code == 2


def test_bytes_below_zero() -> None:
    assert (signed(-2048), signed(2048)) == ("-2 KiB", "2 KiB")
