import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unlearn.errors import UserError
from unlearn.objectives import OBJECTIVES
from unlearn.recipes import files
from unlearn.recipes.mistakes import RecipeError
from unlearn.recipes.schema import Recipe
from unlearn.recipes.yaml_text import parse, to_text

BAD = """\
method: npo
model:
  pth: a
  dtype: fp16
data: {template: "hi"}
terms:
  - {objective: npoo, on: forget}
  - {objective: npo, on: fget, betta: 0.1, wieght: 2}
  - {objective: npo, weight: 1}
training:
  learning_rate: -1
  fp16: true
  gradient_checkpointing: yes
evals: null
learning_rate: 1e-4
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def changed(name: str, *overrides: str) -> Recipe:
    return files.load(name, overrides)


def refused(*overrides: str, name: str = "npo") -> str:
    with pytest.raises(RecipeError) as caught:
        files.load(name, overrides)
    return caught.value.message


@pytest.mark.parametrize("name", files.recipe_names())
def test_every_shipped_recipe_loads_says_how_to_run_it_and_round_trips(name, tmp_path):
    recipe = files.load(name)
    first = files.read_text(files.find(name)).splitlines()[0]
    assert first.startswith((f"# unlearn run {name} ", "# unlearn quickstart"))
    assert recipe.description.endswith(".")
    assert recipe.source
    assert files.load(write(tmp_path, files.dump(recipe))) == recipe


def test_methods_and_presets_are_the_files_in_the_folder():
    assert {"grad_ascent", "grad_diff", "kl_min", "npo"} <= set(files.method_names())
    assert {"tofu/npo-llama-3.2-1b", "tofu-tiny/npo", "demo/npo"} <= set(files.preset_names())
    assert files.recipe_names() == files.method_names() + files.preset_names()


POST_TRAINING = {
    *("learning_rate", "num_train_epochs", "warmup_epochs", "lr_scheduler_type", "weight_decay"),
    *("gradient_accumulation_steps", "passes"),
}


@pytest.mark.parametrize("method", files.method_names())
def test_a_methods_file_carries_its_terms_and_which_weights_they_train(method):
    """To post-train, the published rate and epochs belong to a method: with other ones it fails."""
    tree = files.read(files.find(method))
    if files.load(method).posttrains:
        for stage in (tree, tree.pop("first", {})):
            assert set(stage.pop("training", {})) <= POST_TRAINING
    training, model, edit = (tree.pop(name, {}) for name in ("training", "model", "edit"))
    assisted = bool(tree.pop("assistant", {}))
    assert bool(tree.pop("terms", ())) or edit  # an edit may stand alone
    assert set(tree) == {"method", "description", "source"}
    # an assistant is adapters, which need another rate than the model's own weights
    assert set(training) <= ({"learning_rate"} if assisted else {"trainable"})
    assert set(model) == ({"lora"} if assisted else set())
    assert not (assisted and edit)
    assert tree["method"] == method


def test_llama_3_presets_fix_the_date_in_the_prompt():
    data = files.load("tofu/npo-llama-3.2-1b").data
    assert data.system_prompt == "You are a helpful assistant."
    assert data.template_args == {"date_string": "10 Apr 2025"}


def test_presets_of_known_models_need_only_an_output_folder():
    for name in files.preset_names():
        if name.startswith("tofu/"):
            assert [need.split()[0] for need in files.load(name).missing()] == ["out"]


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(UserError, match=r"unknown method or recipe 'nppo'; did you mean 'npo'\?"):
        files.find("nppo")
    with pytest.raises(UserError, match="did you mean 'tofu-tiny/npo'"):
        files.find("tofu-tny/npo")
    with pytest.raises(UserError, match=r"no recipe file 'gone\.yaml'"):
        files.find("gone.yaml")


def test_a_run_folder_is_answered_with_its_recipe(tmp_path):
    write(tmp_path, BAD, "recipe.yaml")
    with pytest.raises(UserError, match=r"give the file: .*recipe\.yaml"):
        files.find(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- npo\n", "holds no keys"),
        ("method: [npo\nseed: 1\n", "line 2: "),
        ("method: npo\nmethod: nll\n", r"line 2: key 'method' is given twice \(first on line 1\)"),
        ("method: a\nterms:\n  - {on: forget, on: retain}\n", "line 3: key 'on' is given twice"),
        ("method: &m npo\nsource: *m\n", "line 2: aliases are not supported"),
        ("method: npo\n1: 2\n", "line 2: key 1 is not text"),
        ("method: !!python/name:os.system x\n", "line 1: could not determine a constructor"),
        ("method: a\n---\nmethod: b\n", "line 2: .*document"),
        ("method: npo\n\tseed: 1", "line 2: "),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_unreadable_yaml_is_one_line_with_its_place(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        files.read(Path(write(tmp_path, text)))
    assert "\n" not in caught.value.message


def test_files_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        files.read(path)
    with pytest.raises(UserError, match="cannot read"):
        files.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-5", 1e-5),
        ("-.5E+3", -500.0),
        ("10", 10),
        ("010", 10),
        ("true", True),
        ("yes", "yes"),
        ("on", "on"),
        ("2025-04-10", "2025-04-10"),
        ("1:30", "1:30"),
        ("null", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("../data/tofu#full:train[:400]", "../data/tofu#full:train[:400]"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    parsed = parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_floats_are_written_as_people_write_them():
    written = to_text({"a": 1e-5, "b": 2.5e-7, "c": 0.1, "d": 1e20, "e": "1e-5", "f": "a\nb "})
    assert written == "a: 1.0e-5\nb: 2.5e-7\nc: 0.1\nd: 1.0e+20\ne: '1e-5'\nf: \"a\\nb \"\n"


def test_every_mistake_is_reported_at_once_with_its_line(tmp_path):
    path = write(tmp_path, BAD)
    with pytest.raises(RecipeError) as caught:
        files.load(path, ["foo", "gamma=1", "training.save_steps=0", "model.retain_modl=x"])
    objectives = ", ".join(sorted(OBJECTIVES))
    head, *lines = caught.value.message.splitlines()
    assert head == f"{path}: {len(lines)} mistakes"
    expected = [
        "--set foo: 'foo' is not KEY=VALUE",
        "--set model.retain_modl=x: unknown key; did you mean 'model.retain_model'?",
        "training.save_steps: 0 given; must be at least 1",
        "line 3: model.pth: unknown key; did you mean 'model.path'?",
        "line 4: model.dtype: 'fp16' given; must be one of auto, float32, bfloat16",
        "line 5: data.template: 'hi' given; must contain {question}",
        f"line 7: terms.0.objective: 'npoo' given; must be one of {objectives}",
        "line 8: terms.1.on: 'fget' given; must be one of forget, retain, refusal, retain_refusal, "
        "alternate, chosen, rejected, text; did you mean 'forget'?",
        "line 8: terms.1.betta: unknown hyperparameter 'betta' of npo; did you mean 'beta'?",
        "line 8: terms.1.wieght: unknown key; did you mean 'terms.1.weight'?",
        "line 9: terms.2.on: missing",
        "line 11: training.learning_rate: -1 given; must be greater than 0",
        "line 12: training.fp16: the pipeline sets this itself; "
        "set `model.dtype` or `training.bf16`",
        "line 13: training.gradient_checkpointing: 'yes' given; must be true or false",
        "line 14: evals: nothing given; must be a group of keys",
        "line 15: learning_rate: unknown key; did you mean 'training.learning_rate'?",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.strip().startswith(start)


def test_one_mistake_is_one_line():
    assert refused("training.learning_rate=-1") == (
        "npo: training.learning_rate: -1 given; must be greater than 0"
    )


def test_hyperparameters_are_checked_against_the_objective():
    assert "terms.0.beta" in refused("beta=-1")
    assert "terms.1.beta: unknown hyperparameter 'beta' of nll" in refused("terms.retain.beta=1")


def test_flags_go_below_overrides_and_above_the_file():
    changes = {"model": {"path": "m"}, "seed": 5}
    recipe = files.load("npo", ["model.path=n"], changes)
    assert (recipe.model.path, recipe.seed) == ("n", 5)
    assert recipe.terms == files.load("npo").terms


def test_overlay_merges_groups_and_replaces_values():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert files.overlay(base, {"a": {"c": [3]}, "e": {"f": 1}}) == {
        "a": {"b": 1, "c": [3]},
        "d": 1,
        "e": {"f": 1},
    }
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_overrides_reach_sections_terms_and_other_training_arguments():
    recipe = changed(
        "npo",
        "training.learning_rate=1e-4",
        "terms.0.beta=0.2",
        "terms.retain.weight=2",
        "model.lora.rank=8",
        "data.template_args.date_string=10 Apr 2025",
        "training.adam_beta2=0.95",
    )
    assert recipe.training.learning_rate == 1e-4
    assert recipe.terms[0].hyper == {"beta": 0.2}
    assert recipe.terms[1].weight == 2
    assert recipe.model.lora.rank == 8
    assert recipe.data.template_args == {"date_string": "10 Apr 2025"}
    assert recipe.training.extras == {"adam_beta2": 0.95}


def test_open_unlearnings_names_change_the_terms():
    recipe = changed("npo", "gamma=0.125", "alpha=2", "beta=0.5")
    assert [term.weight for term in recipe.terms] == [0.125, 2]
    assert recipe.terms[0].hyper == {"beta": 0.5}


def test_another_objective_drops_the_hyperparameters_of_the_old_one():
    recipe = changed("npo", "terms.forget.objective=grad_ascent", "terms.retain.objective=kl")
    assert [(term.objective, term.hyper) for term in recipe.terms] == [
        ("grad_ascent", {}),
        ("kl", {}),
    ]
    assert changed("npo", "terms.forget.objective=npo").terms[0].hyper == {"beta": 0.1}


def test_text_is_taken_as_it_stands():
    data = changed(
        "npo", "data.template=Question: {question}\nAnswer: ", "data.forget=a#b:train[:400]"
    ).data
    assert data.template == "Question: {question}\nAnswer: "
    assert data.forget == "a#b:train[:400]"
    assert changed("npo", "model.revision=1234").model.revision == "1234"
    assert changed("npo", 'data.template="{question}\\n"').data.template == "{question}\n"
    assert changed("npo", "data.template=null").data.template is None


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("learning_rate=1", "did you mean 'training.learning_rate'?"),
        ("lr=1", "did you mean 'training.learning_rate'?"),
        ("training.lr=1", "did you mean 'training.learning_rate'?"),
        ("training.learning_rat=1", "did you mean 'training.learning_rate'?"),
        ("modle.path=x", "did you mean 'model'?"),
        ("model.lora.rnk=8", "did you mean 'model.lora.rank'?"),
        ("terms.2.beta=1", "no such term; there is terms.0 (npo on forget), terms.1 (nll on"),
        ("terms.forgt.beta=1", "no term is on 'forgt'"),
        ("seed.x=1", "'seed' is a value and has no keys below it"),
        ("terms.0.beta.x=1", "'terms.0.beta' holds 0.1"),
        ("seed=[1", "the value is not valid YAML"),
        ("seed", "'seed' is not KEY=VALUE"),
        ("=1", "'=1' is not KEY=VALUE"),
    ],
)
def test_overrides_that_mean_nothing_are_answered(override, answer):
    assert answer in refused(override)


def test_an_ambiguous_hyperparameter_or_stream_is_not_guessed(tmp_path):
    term = "  - {objective: npo, on: forget, beta: 0.1}\n"
    path = write(tmp_path, "method: two\nterms:\n" + term * 2)
    assert "say terms.0.beta or terms.1.beta" in refused("beta=1", name=path)
    assert "2 terms are on forget; say which" in refused("gamma=2", name=path)
    assert files.load(path, ["terms.1.beta=2"]).terms[1].hyper == {"beta": 2}


def test_apply_overrides_alone_refuses_all_it_cannot_apply():
    tree = files.read(files.find("npo"))
    assert files.apply_overrides(tree, ["beta=0.3"])["terms"][0]["beta"] == 0.3
    assert tree["terms"][0]["beta"] == 0.1
    with pytest.raises(RecipeError) as caught:
        files.apply_overrides(tree, ["sed=1", "x"])
    assert len(caught.value.mistakes) == 2


def test_lora_keeps_the_recipes_adapter_settings():
    assert files.load("npo", lora=True).model.lora.rank == 16
    assert files.load("npo", ["model.lora.rank=4"], lora=True).model.lora.rank == 4
    assert files.load("npo").model.lora is None


def test_a_written_recipe_opens_with_the_command_that_repeats_it():
    recipe = files.load("npo", changes={"out": "runs/my run/"})
    first = files.dump(recipe).splitlines()[0]
    assert first == "# unlearn run 'runs/my run/recipe.yaml' --out 'runs/my run-again'"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
NUMBER = st.floats(min_value=1e-300, max_value=1e300)
TRICKY = st.sampled_from(
    ["yes", "on", "null", "1e-4", "0x1F", "010", "2025-04-10", "1:30", "~", "<<"]
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=TEXT | TRICKY, number=NUMBER, args=st.dictionaries(TEXT | TRICKY, NUMBER | TEXT | TRICKY)
)
def test_any_recipe_survives_writing_and_reading(text, number, args):
    recipe = Recipe.model_validate(
        {
            "method": text,
            "model": {"path": text, "lora": {"targets": [text], "alpha": number}},
            "data": {"system_prompt": text, "template_args": args},
            "terms": [{"objective": "npo", "on": "forget", "weight": number, "beta": number}],
            "training": {"learning_rate": number},
            "out": text,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        assert files.load(write(Path(folder), files.dump(recipe))) == recipe
