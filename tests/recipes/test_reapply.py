"""A recipe that adds the update of an earlier run: planned, run and recorded, or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from unlearn.edits.update import Update, load_update, save_update
from unlearn.errors import UserError
from unlearn.recipes.files import load
from unlearn.recipes.plan import plan_run
from unlearn.recipes.prepare import prepare
from unlearn.recipes.run import run
from unlearn.runs import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
NAME = "model.layers.0.mlp.up_proj.weight"
GOAL = ("edit.forget_nll=8.0", "edit.retain_kl=5.0", "edit.steps=1")


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(f"{folder}/model").state_dict()


def same(first, second):
    return all(torch.equal(one, second[name]) for name, one in first.items())


def write_update(name=NAME, shape=(48, 32)):
    torch.manual_seed(0)
    save_update(Update({name: -torch.randn(shape)}, {"edit": "kfade"}), Path("u.safetensors"))
    return "edit.update=u.safetensors"


def test_the_update_of_a_run_is_added_again(recipe, monkeypatch, tmp_path):
    """With scale 1 to the same start: the edited model again. The run's own update leads there."""
    first = run(recipe("kfade", *GOAL, "edit.update_rank=2", out="first"))
    told = first["training"]
    assert 0.9 < told["changed_share"] <= 1
    assert told["rounding"] < 1e-3
    assert told["rank"] == 2
    low = load_update(Path("first/update.safetensors"))
    assert low.about["relative_error"] == told["relative_error"] > 0
    assert {one.left.shape[1] for one in low.kept.values()} == {2}
    again = recipe("reapply", "edit.update=first/update.safetensors", "edit.scale=1", out="again")
    results = run(again)
    told = results["training"]
    assert (told["scale"], told["is_start"], len(told["trials"])) == (1, True, 1)
    assert told["origin"]["edit"] == "kfade"
    assert results["training"]["curve"][0]["alpha"] == 1
    monkeypatch.chdir(tmp_path.parent)  # a recorded recipe names its update from anywhere
    monkeypatch.syspath_prepend(str(tmp_path))
    third = load(tmp_path / "again/recipe.yaml", [], {"out": str(tmp_path / "third")})
    run(third)
    assert same(weights(tmp_path / "third"), weights(tmp_path / "again"))


def test_the_scale_is_searched_and_every_trial_is_kept(recipe):
    change = write_update()
    results = run(recipe("reapply", change, "edit.forget_nll=null", "edit.retain_kl=0.01"))
    told, events = results["training"], RunFolder(Path("out")).events("trial")
    assert told["curve"][0]["retain/kl"] <= 0.01
    assert [event["scale"] for event in events] == [one["scale"] for one in told["trials"]]
    update = load_update(Path("out/update.safetensors"))
    start = AutoModelForCausalLM.from_pretrained("model").state_dict()
    given = load_update(Path("u.safetensors")).weights[NAME]
    assert torch.equal(update.weights[NAME], told["scale"] * given)
    assert torch.equal(weights("out")[NAME], start[NAME] + update.weights[NAME])
    assert Path("out/report.html").is_file()


def test_a_plan_counts_trials_and_what_is_added(recipe):
    searched, taken = (
        plan_run(prepare(recipe("reapply", write_update(), *more)))
        for more in ((), ("edit.scale=1",))
    )
    parts = {part["part"]: part["bytes"] for part in searched["memory"]}
    assert parts["start"] == 4 * 48 * 32
    assert parts["update"] == Path("u.safetensors").stat().st_size
    assert not {"curvature", "gradient", "optimizer", "activations"} & parts.keys()
    assert searched["tokens"]["total"] == 4.5 * taken["tokens"]["total"]
    assert searched["steps"]["total"] == 1


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.7.mlp.up_proj.weight", (48, 32), "which this model does not have"),
        (NAME, (48, 16), r"of shape \[48, 16\], which is \[48, 32\] here"),
    ],
)
def test_updates_of_other_models_are_refused_before_weights_are_loaded(
    recipe, monkeypatch, name, shape, message
):
    monkeypatch.setattr("unlearn.models.load_model", None)
    with pytest.raises(UserError, match=message):
        run(recipe("reapply", write_update(name, shape)))
    assert not Path("out").exists()


def test_other_files_are_refused_before_weights_are_loaded(recipe, monkeypatch):
    monkeypatch.setattr("unlearn.models.load_model", None)
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    for changes, message in (
        ([], r"edit\.update is missing"),
        (["edit.update=other.safetensors"], "holds no update"),
        (["edit.update=gone.safetensors"], r"no update file 'gone\.safetensors'"),
    ):
        with pytest.raises(UserError, match=message):
            run(recipe("reapply", *changes))
    assert not Path("out").exists()
