"""Parts of a recipe that only post-training has, and what it cannot be combined with.

This module must stay importable without torch.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unlearn.recipes.section import Section

if TYPE_CHECKING:
    from unlearn.recipes.schema import Recipe


class CollapseSection(Section):
    """When training on pairs counts as collapsed: what was right becomes unlikely too."""

    drop: float = Field(default=1.0, gt=0)
    """Nats per token that chosen answers may lose, from the first steps to the last ones."""
    window: int = Field(default=10, ge=1)
    """Optimiser steps over which both are averaged."""
    stop: bool = False
    """End the training there and save what it has come to; else only warn."""


class ReweightSection(Section):
    """Let the rows of a term count by their losses, by how they stand among others."""

    strategy: Literal["uniform", "linupper", "upper", "quadratic", "extremes"] = "linupper"
    """Which rows count more: `linupper` all but easy ones, `upper` the hardest; see docs."""
    max_weight_ratio: float = Field(default=10.0, ge=1)
    """How many times one row may count another; 1 lets all count alike."""
    scope: Literal["micro", "step", "stream", "cached"] = "micro"
    """Among which rows: one pass of all processes, the step, the steps so far, the last epoch."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps in which every row counts alike."""
    anneal: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps after that over which the ratio grows to its full size."""
    trim: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the rows at either end that does not set the range: against single bad rows."""


class PruneSection(Section):
    """Leave rows out of epochs by their last loss; the number of steps is known beforehand."""

    method: Literal["infobatch", "seta"] = "infobatch"
    """Fewer easy rows, which then count more; or a window of rows that moves from easy to hard."""
    keep: float = Field(default=0.5, gt=0, le=1)
    """Share kept: of the easy rows (infobatch), of all rows (seta)."""
    easy: float = Field(default=0.5, gt=0, le=1)
    """infobatch: share of the rows that count as easy, those with the lowest losses."""
    groups: int = Field(default=10, ge=2)
    """seta: groups of rows, by loss."""
    window: float = Field(default=0.5, gt=0, le=1)
    """seta: share of the groups that an epoch has."""
    anneal_from: float = Field(default=0.875, ge=0, le=1)
    """Share of the epochs after which no row is left out by its loss."""


def purpose_mistake(recipe: "Recipe") -> tuple[str, str] | None:
    """Name a key that does not go with what the recipe is for, and say why; None: all do."""
    if recipe.posttrains:
        return _posttraining_mistake(recipe)
    data = recipe.data
    vain = {"data.pairs": data.pairs, "data.text": data.text, "data.heldout": data.heldout}
    for key, value in vain.items():
        if value is not None:
            return key, "given, but no term reads it: only terms on chosen, rejected or text do"
    if recipe.first:
        return "first", "given with terms that unlearn; only post-training has a first stage"
    if recipe.training.prune:
        return "training.prune", "given with terms that unlearn, which need every row"
    return None


def _posttraining_mistake(recipe: "Recipe") -> tuple[str, str] | None:
    data, evals = recipe.data, recipe.evals
    vain = {
        "data.forget": data.forget,
        "data.retain": data.retain,
        "data.unseen": data.unseen,
        "data.forget_extra": data.forget_extra or None,
        "data.retain_extra": data.retain_extra or None,
        "data.select": data.select,
        "data.refusals": data.refusals,
        "model.retain_model": recipe.model.retain_model,
        "evals.tofu": evals.tofu,
        "evals.familiarity": evals.familiarity,
        "evals.retain_kl": evals.retain_kl or None,
        "assistant": recipe.assistant,
        "edit": recipe.edit,
    }
    for key, value in vain.items():
        if value is not None:
            return key, "given with terms that post-train, which forget nothing: leave it out"
    if data.text is not None and "text" not in recipe.read_streams():
        return "data.text", "given, but no term reads it; rows to be measured only are data.heldout"
    if recipe.first and not _trains_rows(recipe):
        return "first.terms", "must be on chosen, rejected or text, as the terms are"
    if recipe.first and recipe.model.quantize:
        return "model.quantize", "given with first, whose adapters are merged into whole weights"
    if recipe.first and evals.select_best:
        return "evals.select_best", "given with first, whose steps it cannot choose among"
    return _prune_mistake(recipe) or (_prune_mistake(recipe.first_recipe) if recipe.first else None)


def _prune_mistake(recipe: "Recipe | None") -> tuple[str, str] | None:
    if recipe is None or recipe.training.prune is None:
        return None
    training = recipe.training
    if training.max_steps > 0 or training.num_train_epochs != int(training.num_train_epochs):
        return "training.prune", "needs whole epochs: leave max_steps out, and give no part of one"
    if any(term.reweight and term.reweight.scope == "cached" for term in recipe.terms):
        return (
            "training.prune",
            "given with reweight.scope cached, which needs every row: use stream",
        )
    return None


def _trains_rows(recipe: "Recipe") -> bool:
    first = recipe.first_recipe
    return first is None or first.posttrains
