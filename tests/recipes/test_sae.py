"""A recipe that clamps features: planned, run and recorded, or refused before any weights load."""

import json
from pathlib import Path

import pytest
import torch

from unlearn.errors import RunFailed, UserError
from unlearn.models import ModelSource, load_model
from unlearn.recipes.files import load
from unlearn.recipes.plan import plan_run
from unlearn.recipes.prepare import prepare
from unlearn.recipes.run import run
from unlearn.runs import RunFolder
from unlearn.sae.clamped import found
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.hook import Hook
from unlearn.sae.storage import save_dictionary

EASY = ("edit.tau=1.0", "edit.retain_kl=null", "evals.generate=false")
ONE = (*EASY, "edit.features=3", "edit.c=2x")


def write_dictionary(name="d.safetensors", layer=0, width=32, seed=0):
    torch.manual_seed(seed)
    w = torch.randn(width, 64) * 0.3
    made = Dictionary(
        "jumprelu", w, torch.zeros(64), w.t().contiguous(), torch.zeros(width),
        torch.full((64,), 0.02), hook=Hook(layer),
    )  # fmt: skip
    save_dictionary(made, Path(name))
    return f"edit.dictionary={name}"


def test_a_run_leaves_a_clamped_model_and_tells_of_its_features(recipe, monkeypatch, tmp_path):
    results = run(recipe("sae", write_dictionary(), *ONE))
    told = results["training"]["clamp"]
    (layer,) = told["dictionaries"]
    assert (len(layer["features"]), layer["layer"], told["mode"]) == (3, 0, "clamp")
    assert layer["c"] == pytest.approx(2 * layer["p99"])
    first, *_, last = layer["features"]
    assert 1 >= first["forget"] >= last["forget"] > 0
    assert first["examples"][0]["token"]
    assert [one["mode"] for one in told["controls"]] == ["zero", "random"]
    assert told["start"]["forget/nll"] != told["forget/nll"]
    (step,) = RunFolder(Path("out")).events("step")
    assert step["retain/kl"] == told["retain/kl"] > 0
    model = load_model(ModelSource("out/model"), device="cpu")
    (clamp,) = found(model).clamps
    assert list(clamp.features) == [one["id"] for one in layer["features"]]
    assert clamp.offset == layer["c"]
    before, after = (results["metrics"][name]["forget_Q_A_Prob"] for name in ("before", "after"))
    assert before != after
    assert not Path("out/update.safetensors").exists()
    page = Path("out/report.html").read_text()
    for text in ("Clamped features", "other directions", f">{first['id']}<", "Nothing is erased"):
        assert text in page
    assert "Features of layer 0" in Path("out/report.md").read_text()
    monkeypatch.chdir(tmp_path.parent)  # a recorded recipe names its dictionary from anywhere
    again = load(tmp_path / "out/recipe.yaml", [], {"out": str(tmp_path / "again")})
    assert run(again)["training"]["clamp"]["dictionaries"] == [
        layer | {"path": str(tmp_path / "d.safetensors")}
    ]


def test_the_setting_that_forgets_most_within_the_budget_is_taken(recipe):
    grid = ("edit.features=[2, 6]", "edit.c=[0.01, 1.0]", "edit.retain_kl=0.01")
    results = run(recipe("sae", write_dictionary(), *EASY[::2], *grid))
    told, trials = results["training"]["clamp"], RunFolder(Path("out")).events("trial")
    assert len(told["settings"]) == len(trials) == 4
    within = [one for one in told["settings"] if one["retain/kl"] <= 0.01]
    assert 0 < len(within) < 4
    assert [one["within"] for one in told["settings"]] == [
        one in within for one in told["settings"]
    ]
    assert told["forget/nll"] == max(one["forget/nll"] for one in within)
    assert "The 4 settings that were tried" in Path("out/report.html").read_text()


def test_no_setting_within_the_budget_leaves_no_model(recipe):
    with pytest.raises(
        RunFailed, match=r"no setting stays within retain_kl 1e-12: the nearest of 1"
    ):
        run(recipe("sae", write_dictionary(), *ONE, "edit.retain_kl=1e-12"))
    assert not Path("out/model").exists()


def test_two_layers_vetoes_and_chosen_features(recipe):
    """A veto takes the first feature away; a file of features takes them as they are listed."""
    both = "edit.dictionary=[a.safetensors, b.safetensors]"
    write_dictionary("a.safetensors", 1, seed=1)
    write_dictionary("b.safetensors", 0)
    first = run(recipe("sae", both, *ONE, out="first"))["training"]["clamp"]
    ids = [[one["id"] for one in each["features"]] for each in first["dictionaries"]]
    assert [one["layer"] for one in first["dictionaries"]] == [0, 1]
    veto = f"edit.exclude=['1:{ids[1][0]}']"
    second = run(recipe("sae", both, *ONE, veto, out="second"))["training"]["clamp"]
    again = [[one["id"] for one in each["features"]] for each in second["dictionaries"]]
    assert again[0] == ids[0]
    assert again[1][:2] == ids[1][1:]
    listed = {"format": 1, "dictionaries": first["dictionaries"]}
    listed["dictionaries"][0]["features"].reverse()
    Path("f.json").write_text(json.dumps(listed))
    third = run(recipe("sae", both, *ONE, "edit.selected=f.json", out="third"))
    taken = [one["id"] for one in third["training"]["clamp"]["dictionaries"][0]["features"]]
    assert taken == ids[0][::-1]
    write_dictionary("b.safetensors", 0, seed=5)
    with pytest.raises(UserError, match=r"'.*f.json' was made for other dictionaries than"):
        prepare(recipe("sae", both, *ONE, "edit.selected=f.json", out="fourth"))


def test_a_plan_counts_settings_and_what_is_kept(recipe):
    one, several = (
        plan_run(prepare(recipe("sae", write_dictionary(), *changes)))
        for changes in (ONE, (*EASY, "edit.c=[1x, 2x]", "edit.retain_kl=1.0", "edit.features=3"))
    )
    parts = {part["part"]: part["bytes"] for part in one["memory"]}
    assert parts["dictionaries"] == 4 * (2 * 32 * 64 + 2 * 64 + 32)
    assert not {"curvature", "gradient", "optimizer", "activations"} & parts.keys()
    assert one["tokens"]["total"] < several["tokens"]["total"]
    files = {file["path"]: file["bytes"] for file in one["files"]}
    assert files["model/"] == 4 * 32 * 6
    assert "update.safetensors" not in files


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 16}, "is for activations of width 16, the model's have 32"),
        ({"layer": 5}, "reads layer 5, but the model has 2 layers"),
    ],
)
def test_dictionaries_of_other_models_are_refused_early(recipe, monkeypatch, given, message):
    monkeypatch.setattr("unlearn.models.load_model", None)
    with pytest.raises(UserError, match=message):
        run(recipe("sae", write_dictionary(**given)))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((), r"edit\.dictionary is missing \(--set edit\.dictionary=FOLDER"),
        (("edit.dictionary=gone",), "no dictionary 'gone'"),
        (("edit.dictionary=d.safetensors", "edit.retain_kl=null"), "set retain_kl or retain_rise"),
        (("edit.dictionary=d.safetensors", "edit.c=three"), "c of sae is 'three'"),
        (("edit.dictionary=d.safetensors", "edit.mode=scale"), "with mode scale it is a factor"),
        (("edit.dictionary=d.safetensors", "edit.exclude=[64]"), "feature 64 given, but the dict"),
        (("edit.dictionary=d.safetensors", "edit.exclude=['3:1']"), "exclude names layer 3, which"),
        (("edit.dictionary=[d.safetensors, d.safetensors]",), "both read layer 0"),
        (("edit.dictionary=[a, b]", "edit.exclude=[3]"), "write LAYER:FEATURE"),
        (
            ("edit.dictionary=d.safetensors", "edit.selected=gone.json"),
            "gone.json' lists no features",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(recipe, changes, message):
    write_dictionary()
    with pytest.raises(UserError, match=message):
        run(recipe("sae", *changes))
    assert not Path("out/model").exists()


def test_nothing_found_says_what_is_nearest(recipe):
    with pytest.raises(UserError, match=r"on less than tau=1e-05 .*the nearest is \d+, on "):
        run(recipe("sae", write_dictionary(), *ONE[1:], "edit.tau=1e-5"))
