"""What a recipe still needs before it can be run, and what it was given in vain.

This module must stay importable without torch.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from unlearn.data.pairs import SIDES
from unlearn.recipes.sections import EDIT_NEEDS
from unlearn.recipes.terms import rows_of

if TYPE_CHECKING:
    from unlearn.recipes.schema import Recipe

Need = tuple[str, object, str]
"""A key, its value, and the flag that gives it."""


def missing_keys(recipe: "Recipe") -> list[str]:
    """List what a run still needs, one line each, with the flag that gives it."""
    rows = _posttraining(recipe) if recipe.posttrains else _unlearning(recipe)
    needs = [
        ("model.path", recipe.model.path, "--model, the model to change"),
        *rows,
        ("out", recipe.out, "--out, a new folder for the run"),
    ]
    return [f"{key} is missing ({why})" for key, value, why in needs if value is None]


def _posttraining(recipe: "Recipe") -> Iterator[Need]:
    read, data = recipe.read_streams(), recipe.data
    if read & set(SIDES):
        yield "data.pairs", data.pairs, "--pairs, rows with a chosen and a rejected answer"
    elif "text" in read and data.pairs is None:
        yield "data.text", data.text, "--text, the rows to train on"


def _unlearning(recipe: "Recipe") -> Iterator[Need]:
    yield "data.forget", recipe.data.forget, "--forget, the rows to forget"
    if why := _needs_retain(recipe):
        yield "data.retain", recipe.data.retain, f"--retain, the rows to keep: {why}"
    edit = recipe.edit
    if edit and edit.reads_unseen:
        asked = "rows like the forget set that the model has not seen: edit asks for them"
        yield "data.unseen", recipe.data.unseen, asked
    for key, way in EDIT_NEEDS.items():
        if edit and key in edit.hyper:
            yield f"edit.{key}", edit.hyper[key], way


def _needs_retain(recipe: "Recipe") -> str | None:
    """Say what reads the retain set; None when nothing does."""
    retains = [term.objective for term in recipe.terms if rows_of(term.on) == "retain"]
    select = recipe.data.select
    users = {
        f"term '{retains[0]}' is on retain" if retains else "": bool(retains),
        "data.select.by is keyword": bool(
            select is not None and select.by == "keyword" and not select.keywords
        ),
        "evals.retain_kl is measured on them": recipe.evals.retain_kl,
        "the edit is measured on them": not recipe.trains,
    }
    return next((why for why, needed in users.items() if needed), None)
