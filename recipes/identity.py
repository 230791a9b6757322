"""What a training depends on: a checkpoint may only continue the training that wrote it."""

from typing import Any

from unlearn.objectives import find
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.schema import Recipe
from unlearn.recipes.terms import Term

BOOKKEEPING = (
    "training.save_steps",
    "training.save_total_limit",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.global_batch_size",
    "training.dataloader_num_workers",
    "model.path",
    "model.revision",
    "model.retain_model",
    "model.trust_remote_code",
)
"""Keys that change no step, or whose effect is said in another way (hashes, rows per step)."""
WHOLE = ("none", "ddp")
"""Engines whose checkpoints hold everything in one piece, whatever the number of processes."""


def training_identity(prepared: Prepared, weights_hash: str) -> dict[str, Any]:
    """Name everything that decides the course of a training, by recipe key.

    Rows and weights count by their hashes. A run of the engines ``none`` and ``ddp`` may go on with
    another number of processes when ``rows_per_step`` stays: the steps are the same; only dropout
    draws other random numbers.
    """
    recipe = prepared.recipe
    sections = {
        name: getattr(recipe, name).model_dump(mode="json") for name in ("model", "training")
    }
    found = {
        f"{section}.{key}": value
        for section, content in sections.items()
        for key, value in content.items()
        if f"{section}.{key}" not in BOOKKEEPING
    }
    found |= {
        "model weights": weights_hash[:16],
        "terms": [_term(term) for term in recipe.terms],
        "seed": recipe.seed,
        "rows_per_step": prepared.rows_per_step,
    }
    if assistant := recipe.assistant:
        found["assistant"] = assistant.model_dump(mode="json", include={"layers", "combine"})
    found |= {f"{name} rows": one.sha256()[:16] for name, one in prepared.streams.items()}
    if select := recipe.data.select:
        found["data.select"] = select.settings() | {"seed": select.seed}
    return found | _engine(recipe)


def _term(term: Term) -> dict[str, Any]:
    """Describe a term; a loss from a file counts by its name and content, not by its place."""
    found = term.model_dump(mode="json")
    objective = find(term.objective)
    if objective.sha256:
        found["objective"] = f"{objective.name} {objective.sha256[:16]}"
    return found


def _engine(recipe: Recipe) -> dict[str, Any]:
    launch = recipe.launch
    if launch.chosen in WHOLE:
        return {"launch.engine": "none or ddp"}
    return {"launch.engine": launch.chosen, "processes": launch.processes}
