"""The pipeline as a library: a recipe becomes a folder, and nothing is left of a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.errors import UserError
from unlearn.recipes import inputs
from unlearn.recipes.prepare import prepare
from unlearn.recipes.run import run
from unlearn.runs import RunFolder


def test_a_run_leaves_one_file_per_stage(recipe):
    events: list[dict[str, Any]] = []
    results = run(recipe("npo", "evals.every=2"), emit=events.append)
    found = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    assert {
        "recipe.yaml", "manifest.json", "events.jsonl", "results.json", "report.html",
        "report.md", "evals/before.json", "evals/step-2.json", "evals/step-4.json",
        "evals/after.json", "model/config.json", "model/model.safetensors",
    } <= found  # fmt: skip
    stages = [event["stage"] for event in events if event["event"] == "stage"]
    # 10 rows are 5 batches, 3 optimiser steps per epoch, 6 in all
    expected = ["load", "benchmark", "reference", "train", "benchmark", "benchmark", "save",
                "benchmark"]  # fmt: skip
    assert stages == expected
    assert results == json.loads(Path("out/results.json").read_text())
    assert [entry["step"] for entry in results["training"]["curve"]] == [1, 2, 3, 4, 5, 6]
    assert results["training"]["steps"] == 6
    assert results["provenance"]["retain"] == {
        "source": "retain.jsonl",
        "rows": 10,
        "sha256": prepare(recipe()).streams["retain"].sha256(),
    }
    assert results["metrics"]["after"] != results["metrics"]["before"]
    assert {row["split"] for row in results["examples"]} == {"forget", "retain"}


@pytest.mark.parametrize("method", ["grad_ascent", "grad_diff", "kl_min", "npo"])
def test_every_method_with_adapters(recipe, method):
    from transformers import AutoModelForCausalLM

    changes = ("model.lora={rank: 2}", "training.max_steps=1", "training.warmup_steps=0")
    run(recipe(method, *changes))
    before = AutoModelForCausalLM.from_pretrained("model").state_dict()
    after = AutoModelForCausalLM.from_pretrained("out/model").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )
    # token embeddings have no adapter
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert Path("out/adapter/adapter_config.json").is_file()


def test_same_seed_same_run(recipe):
    first, again = run(recipe(out="one")), run(recipe(out="two"))
    other = run(recipe("npo", "seed=1", out="three"))
    assert first["metrics"] == again["metrics"]
    assert first["training"]["curve"] == again["training"]["curve"]
    assert first["training"]["curve"] != other["training"]["curve"]


def test_retain_model_is_measured_in_the_same_precision(recipe, monkeypatch):
    from unlearn import models

    seen = []
    read = models.load_model

    def watched(source: Any, **named: Any) -> Any:
        seen.append((source.path, source.dtype))
        return read(source, **named)

    monkeypatch.setattr(models, "load_model", watched)
    changes = ("model.retain_model=model", "model.dtype=bfloat16", "training.max_steps=1")
    results = run(recipe("npo", *changes, "training.warmup_steps=0"))
    assert seen == [("model", "bfloat16"), ("model", "bfloat16"), ("out/model", "bfloat16")]
    assert results["metrics"]["retain_model"] == results["metrics"]["before"]


def test_mistake_found_after_the_folder_was_made_takes_it_away(recipe, monkeypatch):
    def refuse(source: Any) -> Any:
        assert Path("out/recipe.yaml").is_file()
        raise UserError("the weights do not fit")

    monkeypatch.setattr("unlearn.models.load_model", refuse)
    with pytest.raises(UserError, match="do not fit"):
        run(recipe())
    assert not Path("out").exists()


def test_mistake_found_after_training_takes_nothing_away(recipe, monkeypatch):
    def refuse(*arguments: Any) -> Any:
        raise UserError("the report template is broken")

    monkeypatch.setattr("unlearn.recipes.run.write_report", refuse)
    with pytest.raises(UserError):
        run(recipe())
    assert Path("out/model/model.safetensors").is_file()
    assert not Path("out/results.json").exists()


def test_failure_before_the_first_file_takes_the_folder_away(recipe, monkeypatch):
    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unlearn.recipes.run.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        run(recipe())
    assert not Path("out").exists()


def test_the_folder_is_locked_while_the_run_writes(recipe):
    refused = []

    def second_writer(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            with (
                pytest.raises(UserError, match="is being written by"),
                RunFolder(Path("out")).locked(),
            ):
                pass
            refused.append(event["step"])

    run(recipe("npo", "training.max_steps=2"), emit=second_writer)
    assert refused == [1, 2]


def test_written_recipe_names_files_from_anywhere(recipe, tmp_path):
    written = inputs.absolute(
        recipe("npo", "data.retain=retain.jsonl:train[:5]", "model.retain_model=owner/name")
    )
    assert written.model.path == str(tmp_path / "model")
    assert written.model.retain_model == "owner/name"
    assert written.data.forget == str(tmp_path / "forget.jsonl")
    assert written.data.retain == str(tmp_path / "retain.jsonl") + ":train[:5]"
    assert written.out == str(tmp_path / "out")
    assert inputs.absolute(written) == written


def test_a_folder_with_a_mark_in_its_name_stays_relative(recipe, tmp_path, monkeypatch):
    """``/a#b/rows#config`` would be read as configuration ``b/rows#config`` of ``/a``."""
    odd = tmp_path / "a#b"
    (odd / "rows").mkdir(parents=True)
    (odd / "rows" / "train.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.chdir(odd)
    written = inputs.absolute(recipe("npo", "data.forget=rows#default"))
    assert written.data.forget == "rows#default"


def test_early_checks_need_no_torch(recipe, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from unlearn.errors import UserError\n"
        "from unlearn.recipes.inputs import check_early\n"
        "try: check_early('npo', ['data.forget=nowhere.jsonl'], {'model': {'path': 'model'},"
        " 'data': {'retain': 'retain.jsonl'}, 'out': 'out'})\n"
        "except UserError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nowhere.jsonl" in done.stdout


@pytest.mark.parametrize(
    ("epochs", "steps"), [(2, 6), (0.5, 2), (1.5, 5)], ids=["whole", "half", "one and a half"]
)
def test_number_of_steps(recipe, epochs, steps):
    """Ten rows in batches of 2, two batches per step: 3 steps per epoch, rounded up."""
    prepared = prepare(recipe("npo", f"training.num_train_epochs={epochs}"))
    assert prepared.steps_per_epoch == 3
    assert prepared.steps == steps


def test_steps_are_those_the_trainer_makes(recipe):
    made = recipe("npo", "training.num_train_epochs=1.5", "evals.generate=false")
    assert run(made)["training"]["steps"] == prepare(made).steps
