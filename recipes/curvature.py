"""Curvature fitted once with the settings of a recipe, for the runs that will read it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import set_seed

from unlearn import models
from unlearn.curvature.fit import Curvature
from unlearn.curvature.storage import save_curvature
from unlearn.data import pad_token_id
from unlearn.edits import EDITS
from unlearn.edits.factors import retain_curvature
from unlearn.errors import UserError
from unlearn.ranks import Ranks
from unlearn.recipes import outcome
from unlearn.recipes.prepare import open_tokenizer
from unlearn.recipes.schema import Recipe
from unlearn.recipes.streams import Stream, read_stream


def fit(
    recipe: Recipe,
    out: Path,
    *,
    emit: Callable[[dict[str, Any]], None] = lambda event: None,
    offline: bool = False,
) -> Curvature:
    """Fit the curvature that a run of the recipe would fit, and keep it in a new file.

    A run with the same model, retain set and settings reads it as ``edit.factors``. The recipe's
    forget set is not looked at, and need not be named.

    Raises:
        UserError: the recipe's edit has no curvature, something is missing, the file exists.
    """
    hyper = _settings(recipe, out)
    source, stream = _retain(recipe, offline=offline)
    emit({"event": "stage", "stage": "load"})
    set_seed(recipe.seed)
    model = outcome.to_edit(recipe, models.load_model(source))
    emit({"event": "stage", "stage": "curvature"})
    with models.recomputed(model, on=recipe.training.gradient_checkpointing):
        found = retain_curvature(model, stream.examples, hyper, emit, recipe.seed)
    Ranks.world().first(lambda: save_curvature(found, out))
    return found


def _settings(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Give all hyperparameters of the edit; refuse what would only be noticed at the end."""
    edit = recipe.edit
    if edit is None or "curvature" not in EDITS[edit.name].hyper:
        raise UserError(f"method '{recipe.method}' has no curvature to fit", "kfade has")
    if Ranks.world().rank == 0 and out.exists():
        raise UserError(f"output file '{out}' already exists", "choose another --out")
    needs = (
        ("model.path", recipe.model.path, "--model, the model to change"),
        ("data.retain", recipe.data.retain, "--retain, the rows to keep"),
    )
    if missing := [f"{key} is missing ({flag})" for key, given, flag in needs if given is None]:
        raise UserError("; ".join(missing), "give the flags, or write the keys in the recipe")
    hyper = EDITS[edit.name].filled(edit.hyper)
    if why := EDITS[edit.name].check(hyper):
        raise UserError(f"edit: {why}")
    return hyper


def _retain(recipe: Recipe, *, offline: bool) -> tuple[models.ModelSource, Stream]:
    """Read the retain set as a run does."""
    source, tokenizer, template = open_tokenizer(recipe, offline=offline)
    stream = read_stream(recipe, "retain", tokenizer, template, offline=offline)
    assert stream is not None  # _settings
    used = {token for one in stream.examples for token in one.input_ids}
    models.check_vocabulary(source, used | {pad_token_id(tokenizer)})
    return source, stream
