"""A loss of one's own and annotated tokens, from a recipe to the trainer, manifest and identity."""

import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.checkpoints import differences
from unlearn.errors import UserError
from unlearn.recipes.files import dump, load
from unlearn.recipes.identity import training_identity
from unlearn.recipes.inputs import absolute
from unlearn.recipes.mistakes import RecipeError
from unlearn.recipes.prepare import prepare
from unlearn.recipes.run import run

LOSS = """
from jaxtyping import Float
from torch import Tensor
from unlearn.scores import Scores

def my_loss(policy: Scores, *, beta: float = {}) -> Float[Tensor, "batch seq"]:
    return beta * policy.log_probs
"""
MINE = "terms.forget.objective=./my_loss.py:my_loss"


@pytest.fixture
def own(recipe: Any) -> Any:
    Path("my_loss.py").write_text(LOSS.format(1.0))
    return lambda *changes, **given: recipe("npo", MINE, *changes, **given)


def identity(made: Any) -> dict[str, Any]:
    return training_identity(prepare(made, offline=True), "a" * 64)


def test_the_file_counts_by_its_content(own: Any) -> None:
    before = identity(own())
    here = absolute(own())
    assert here.terms[0].objective == f"{Path.cwd()}/my_loss.py:my_loss"
    assert differences(before, identity(here)) == ""
    Path("my_loss.py").write_text(LOSS.format(1.0) + "\n# a remark\n")
    assert "terms [" in differences(before, identity(own()))


def test_a_run_names_the_file_and_does_what_the_same_shipped_loss_does(
    own: Any, recipe: Any
) -> None:
    short = ("training.max_steps=2", "evals.generate=false")
    mine = run(own(*short), offline=True)
    (named,) = json.loads(Path("out/manifest.json").read_text())["losses"].items()
    assert named[0] == "./my_loss.py:my_loss"
    assert len(named[1]) == 64
    again = load("out/recipe.yaml").terms[0].objective
    assert again == f"{Path.cwd()}/my_loss.py:my_loss"
    shipped = "terms.forget.objective=grad_ascent"
    theirs = run(recipe("npo", shipped, *short, out="other"), offline=True)
    assert mine["metrics"]["after"] == theirs["metrics"]["after"]
    assert mine["training"]["curve"][1]["forget/my_loss"] == pytest.approx(
        theirs["training"]["curve"][1]["forget/grad_ascent"]
    )
    assert "losses" not in json.loads(Path("other/manifest.json").read_text())


def test_mistakes_come_with_the_others(own: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        own("terms.forget.betta=1", "training.learning_rate=-1")
    assert len(caught.value.mistakes) == 2
    Path("my_loss.py").write_text("def other(policy): ...")
    with pytest.raises(RecipeError, match=r"terms\.0\.objective: the loss .* no function 'my_los"):
        own()


def test_a_recipe_with_its_own_loss_survives_writing(own: Any, tmp_path: Path) -> None:
    made = own("terms.forget.beta=0.5")
    Path("again.yaml").write_text(dump(made))
    assert load("again.yaml") == made


def test_annotations_are_needed_and_found(recipe: Any) -> None:
    changes = ("terms.forget.objective=ga_annotated", "training.max_steps=1")
    with pytest.raises(UserError, match="'ga_annotated' needs to know which tokens are important"):
        prepare(recipe("npo", *changes), offline=True)
    rows = [
        {"question": f"Who is {n}?", "answer": f"{n} was born.", "important": ["born"]}
        for n in range(4)
    ]
    Path("forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepare(recipe("npo", *changes), offline=True)
    for one in made.streams["forget"].examples:
        marked = [i for i, mark in zip(one.input_ids, one.important, strict=True) if mark]
        assert made.tokenizer.decode(marked).strip() == "born"
    plain = made.streams["forget"].sha256()
    rows[0]["important"] = "was"
    Path("forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare(recipe("npo", *changes), offline=True).streams["forget"].sha256() != plain
    found = run(recipe("npo", *changes, "evals.generate=false"), offline=True)
    assert found["training"]["curve"][0]["forget/ga_annotated"] < 0
    rows[2]["important"] = ["Born"]
    Path("forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"row 3 of .* passage 'Born' does not stand in the ans"):
        prepare(recipe("npo", *changes), offline=True)


def test_a_whole_batch_is_weighed_only_where_a_step_is_one_batch(recipe: Any) -> None:
    changes = ("terms.forget.granularity=batch",)
    with pytest.raises(UserError, match="'simsat' weighs a whole batch at once, but a step has 2"):
        prepare(recipe("simsat", *changes), offline=True)
    prepare(recipe("simsat", *changes, "training.gradient_accumulation_steps=1"), offline=True)
