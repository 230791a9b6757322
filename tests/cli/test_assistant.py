"""ULD on the command line: the folder it leaves is a model to every other command."""

import shutil
from pathlib import Path
from typing import Any

import pytest

DATA = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")
FAST = (
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=2",
    "training.warmup_steps=0",
    "evals.max_rows=4",
    "evals.generate=false",
)
ASK = ("--prompt", "Where was Ada born?", "--max-new-tokens", "3")


def settings(*changes: str) -> list[str]:
    return [part for change in (*FAST, *changes) for part in ("--set", change)]


@pytest.fixture
def uld(world: Path, unlearn: Any) -> Any:
    """Run ULD on the tiny model."""
    changes = settings("assistant.layers=1")
    done = unlearn("run", "uld", "--model", "model", *DATA, "--out", "uld", *changes, "--json")
    assert done.code == 0, done.err
    return done.json


def test_its_folder_is_measured_asked_and_compared_like_a_model(uld, unlearn):
    assert uld["method"] == "uld"
    assert not Path("uld/model/config.json").exists()
    asked = unlearn("eval", "generate", "--model", "uld/model", "--target", "model", *ASK, "--json")
    assert asked.code == 0, asked.err
    assert set(asked.json["rows"][0]["answers"]) == {"unlearned", "target"}
    compared = unlearn("compare", "uld", "--json")
    assert compared.code == 0, compared.err
    shown = unlearn("data", "preview", "forget.jsonl", "--model", "uld/model")
    assert shown.code == 0, shown.err
    changes = settings("model.retain_model=uld/model")
    other = unlearn("run", "npo", "--model", "model", *DATA, "--out", "npo", *changes, "--json")
    assert other.code == 0, other.err
    assert other.json["metrics"]["retain_model"] == uld["metrics"]["after"]


def test_without_its_base_it_is_refused_in_one_line(uld, unlearn):
    shutil.move("model", "moved")
    asked = unlearn("eval", "generate", "--model", "uld/model", *ASK)
    assert asked.code == 2
    assert "'uld/model' needs its base: no model folder" in asked.err
    assert "set base_model in uld/model/uld_config.json to where it is now" in asked.err
    assert "Traceback" not in asked.err


def test_it_cannot_be_planned_or_unlearned_again(uld, unlearn):
    for command in ("plan", "run"):
        done = unlearn(command, "npo", "--model", "uld/model", *DATA, "--out", "again")
        assert done.code == 2
        assert "cannot be changed again hint: give its base, " in " ".join(done.err.split())
    assert not Path("again").exists()


def test_a_plan_of_it_says_what_it_would_take(world, unlearn):
    changes = settings("assistant.layers=1")
    done = unlearn("plan", "uld", "--model", "model", *DATA, *changes, "--measure", "--json")
    assert done.code == 0, done.err
    assert done.json["parameters"]["trainable"] < done.json["parameters"]["total"] / 2
    assert done.json["measured"]["seconds_per_step"] > 0


def test_its_layers_are_checked_against_the_model(world, unlearn):
    done = unlearn("run", "uld", "--model", "model", *DATA, "--out", "uld")
    assert done.code == 2
    assert "assistant.layers=8 given, but the model has 2 layers" in done.err
