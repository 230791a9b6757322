"""A recipe with an edit and no terms: planned, run and repeated, or refused for a reason."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unlearn.edits.update import load_update, reapply
from unlearn.errors import UserError
from unlearn.models import load_model
from unlearn.recipes.files import dump, load
from unlearn.recipes.mistakes import find_mistakes
from unlearn.recipes.plan import measure_step, plan_run
from unlearn.recipes.prepare import prepare
from unlearn.recipes.run import run
from unlearn.recipes.schema import Recipe
from unlearn.recipes.yaml_text import parse_tree

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
GOAL = ("edit.forget_nll=8.0", "edit.retain_kl=5.0", "edit.steps=2")


def test_a_run_edits_the_model_and_shows_its_steps(recipe):
    events = []
    results = run(recipe("kfade", *GOAL), emit=events.append)
    stages = [event["stage"] for event in events if event["event"] == "stage"]
    assert stages == ["load", "benchmark", "edit", "save", "benchmark"]
    assert any(event["event"] == "progress" and "curvature" in event["what"] for event in events)
    curve = results["training"]["curve"]
    assert len(curve) == results["training"]["steps"] >= 1
    assert len(results["training"]["step_seconds"]) == len(curve)
    assert sum(results["training"]["step_seconds"]) == pytest.approx(
        results["training"]["seconds"], abs=0.01
    )
    assert "Steps of the edit" in Path("out/report.md").read_text()
    assert {"forget/nll", "retain/kl", "alpha", "predicted_gain", "predicted_kl", "damping",
            "evaluations"} <= set(curve[0])  # fmt: skip
    after, before = (results["metrics"][name]["forget_Q_A_Prob"] for name in ("after", "before"))
    assert after < before, curve
    edited, start = (AutoModelForCausalLM.from_pretrained(path).state_dict()
                     for path in ("out/model", "model"))  # fmt: skip
    changed = {name for name, one in edited.items() if not torch.equal(one, start[name])}
    assert changed
    assert all(".mlp." in name for name in changed)
    assert not Path("out/checkpoints").exists()
    assert Path("out/report.html").is_file()
    update = load_update(Path("out/update.safetensors"))
    again = reapply(load_model("model", device="cpu"), update, scale=1.0)
    assert all(torch.equal(one, edited[name]) for name, one in again.state_dict().items())


def test_a_recorded_recipe_gives_the_same_model(recipe):
    run(recipe("kfade", *GOAL))
    again = load("out/recipe.yaml", [], {"out": "again"})
    assert again.terms == ()
    run(again)
    models = [AutoModelForCausalLM.from_pretrained(f"{out}/model") for out in ("out", "again")]
    for ours, theirs in zip(*(one.parameters() for one in models), strict=True):
        assert torch.equal(ours, theirs)


def test_a_plan_counts_steps_of_the_edit_and_no_optimiser(recipe):
    prepared = prepare(recipe("kfade", *GOAL))
    planned = plan_run(prepared)
    assert planned["edit"] == "kfade"
    assert planned["steps"]["total"] == 2
    parts = {part["part"] for part in planned["memory"]}
    assert {"weights", "curvature", "gradient"} <= parts
    assert "optimizer" not in parts
    assert "checkpoints/" not in {file["path"] for file in planned["files"]}
    with pytest.raises(UserError, match="no steps to be timed"):
        measure_step(prepared)


def test_recomputed_activations_and_a_part_of_the_rows(recipe):
    """The same weights without memory for activations; other weights from half of the rows."""
    run(recipe("kfade", *GOAL))
    run(recipe("kfade", *GOAL, "training.gradient_checkpointing=true", out="recomputed"))
    half = "data.select={by: random, fraction: 0.5}"
    results = run(recipe("kfade", *GOAL, half, out="half"))
    first, second, third = (
        AutoModelForCausalLM.from_pretrained(f"{out}/model").model.layers[0].mlp.up_proj.weight
        for out in ("out", "recomputed", "half")
    )
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first, third, rtol=1e-2, atol=1e-3)
    selection = results["selection"]
    assert len(selection["indices"]) == 5
    assert selection["passes"] == selection["steps"] == 2
    assert "scaled_from" not in selection
    assert "steps of kfade" in Path("half/report.md").read_text()


def mistakes(text):
    return list(map(str, find_mistakes(parse_tree(text, "a.yaml"))))


EDIT = "method: a\nedit: {name: kfade, retain_kl: 1.0}\n"
TERM = "terms: [{objective: nll, on: forget}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: a\n", "terms: missing"),
        ("method: a\nterms: []\n", "no term is on forget and there is no edit"),
        ("method: a\nedit: {name: task_vector}\n", "needs a model that terms have trained"),
        (
            "method: a\nedit: {name: kfade, retain_kl: 1.0}\n" + TERM,
            "trains nothing: leave terms out",
        ),
        (
            EDIT + "launch: {engine: zero3, nproc: 2}\n",
            "launch.engine: zero3 given without terms",
        ),
        ("method: a\nedit: {name: kfade}\n", "edit: step_rule: search needs a goal"),
        (
            "method: a\nedit: {name: kfade, step_rule: trust_region, step_size: 0.1, "
            "curvature: act}\n",
            "curvature: act does not give",
        ),
        ("method: a\nedit: {name: kfade, damping: much}\n", "must be KIND:C with C above 0"),
        ("method: a\nedit: {name: kfade, step_rule: serch}\n", "'search', 'fixed'"),
        ("method: a\nedit: {name: kfade, forget_nl: 3.0}\n", "did you mean 'forget_nll'"),
    ],
)
def test_mistakes_are_named(text, message):
    found = mistakes(text)
    assert len(found) == 1
    assert message in found[0]


def test_retain_rows_are_needed():
    tree = {"method": "a", "edit": {"name": "kfade", "forget_nll": 3.0}}
    missing = Recipe.model_validate(tree).missing()
    assert [line.split()[0] for line in missing] == ["model.path", "data.forget", "data.retain",
                                                     "out"]  # fmt: skip
    assert "terms: []" in dump(Recipe.model_validate(tree))


def test_layers_that_are_missing_are_told_before_anything_is_written(recipe):
    with pytest.raises(UserError, match="found in no layer's name"):
        run(recipe("kfade", *GOAL, "edit.layers=[nothing]"))
    assert not Path("out").exists()


def test_the_seed_of_the_run_decides_the_labels(recipe):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        run(recipe("kfade", *GOAL, f"seed={seed}", out=f"{number}"))
        found.append(load_update(Path(f"{number}/update.safetensors")).weights)
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    assert any(not torch.equal(one, found[2][name]) for name, one in found[0].items())
