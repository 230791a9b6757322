"""Curvature fitted ahead is what the run would have fitted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unlearn.curvature.storage import read_curvature
from unlearn.errors import UserError
from unlearn.recipes.curvature import fit
from unlearn.recipes.run import run

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
GOAL = ("edit.forget_nll=8.0", "edit.retain_kl=5.0", "edit.steps=2", "edit.refit=false")
HOW = ("edit.held_out=2", "edit.retain_tokens=30", "edit.layers=all-linear", "seed=3")


def without_forget(recipe):
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"forget": None}),
                                     "out": None})  # fmt: skip


def fitted_rows(events):
    return [one for one in events if "curvature" in str(one.get("what"))]


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_runs_read_it_and_give_the_same_weights_as_without(recipe, kind):
    """Two forget sets from one fit; each run without the file fits, and ends where the other did.

    Settings are not the defaults, and the goal, which curvature does not depend on, is another.
    """
    how, file, events = (*HOW, f"edit.curvature={kind}"), Path("kept/factors.safetensors"), []
    found = fit(without_forget(recipe("kfade", *how)), file, emit=events.append)
    assert [one["stage"] for one in events if one["event"] == "stage"] == ["load", "curvature"]
    assert fitted_rows(events)
    assert read_curvature(file).counts == found.counts
    for name in ("forget.jsonl", "retain.jsonl"):
        weights = []
        for place, more in enumerate(((), (f"edit.factors={file}",))):
            heard, out = [], f"{name}-{place}"
            run(recipe("kfade", *GOAL, *how, *more, f"data.forget={name}", out=out),
                emit=heard.append)  # fmt: skip
            assert bool(fitted_rows(heard)) == (not more)
            weights.append(load_file(f"{out}/model/model.safetensors"))
        first, second = weights
        assert all(torch.equal(first[name], second[name]) for name in first)
        start = load_file("model/model.safetensors")
        assert any(not torch.equal(first[name], start[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("edit.curvature=act", "fitted with curvature kfac, not act"),
        ("edit.layers=attention", "other layers: 6 from .*gate_proj to .*, not 8 from .*q_proj"),
        ("data.retain=forget.jsonl", "other rows: [0-9a-f]{12}…, not [0-9a-f]{12}…"),
    ],
)
def test_a_file_of_something_else_is_refused_before_anything_is_measured(recipe, settings, message):
    fit(recipe("kfade", *GOAL), Path("factors"))
    heard = []
    with pytest.raises(UserError, match=message):
        run(recipe("kfade", *GOAL, "edit.factors=factors", settings), emit=heard.append)
    assert [one["stage"] for one in heard if one["event"] == "stage"] == ["load"]
    assert not Path("out").exists()


def test_what_cannot_be_kept_is_refused_before_anything_is_loaded(recipe):
    Path("there").touch()
    whole = recipe("kfade")
    nothing = whole.model_copy(update={"data": whole.data.model_copy(update={"retain": None})})
    for given, out, message in (
        (recipe("npo"), "new", "'npo' has no curvature"),
        (whole, "there", "'there' already exists"),
        (nothing, "new", "data.retain is missing"),
    ):
        with pytest.raises(UserError, match=message):
            fit(given, Path(out))
        assert not Path("new").exists()
