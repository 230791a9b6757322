"""What a recipe trains, and what comes of it: the model itself, an assistant, an edited model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import set_seed

from unlearn import models, monitors
from unlearn.assistant.build import Assistant, assisted
from unlearn.assistant.compose import together
from unlearn.assistant.rules import ALONE, settings
from unlearn.edits import EDITS
from unlearn.edits.low_rank import LowRank
from unlearn.edits.update import Update, save_update
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.kinds import kind_in_memory
from unlearn.ranks import Ranks
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.schema import Recipe
from unlearn.runs import RunFolder


def to_train(prepared: Prepared, model: Any) -> Any:
    """Put onto a loaded model what the recipe trains: adapters, or an assistant beside it.

    Raises:
        UserError: an assistant that this model, or these terms, cannot have.
    """
    lora = lora_of(prepared.recipe)
    if lora is None:
        return model
    assistant = assistant_of(prepared)
    if assistant is None:
        return models.add_lora(model, lora)
    _check_terms(prepared, assistant)
    model = assisted(model, assistant, lora)
    plain(model).alone = assistant.combine in ALONE
    return model


def to_edit(recipe: Recipe, model: Any) -> Any:
    """Put adapters onto a loaded model, where the recipe has an edit change these.

    They are drawn from the recipe's seed alone: a resumed run, and every process, must have the
    same.
    """
    lora = lora_of(recipe)
    if lora is None:
        return model
    set_seed(recipe.seed)
    return models.add_lora(model, lora)


@contextmanager
def as_after(prepared: Prepared, model: Any) -> Iterator[Any]:
    """Let a model in training answer as it would after the run."""
    if prepared.recipe.assistant is None:
        yield model
        return
    with together(model):
        yield model


def trained(prepared: Prepared, model: Any) -> Any:
    """End the training of a model: from now on an assistant answers with its base."""
    if prepared.recipe.assistant is not None:
        plain(model).alone = False
    return model


def save(prepared: Prepared, model: Any, folder: Path, adapter: Path) -> None:
    """Write what the run leaves as its model; ``adapter`` is where merged adapters are kept."""
    if kind := kind_in_memory(model):
        kind.save_composed(model, prepared.tokenizer, folder, prepared.source)
        return
    models.save_model(_edited(prepared, model), prepared.tokenizer, folder, adapter)


def _edited(prepared: Prepared, model: Any) -> Any:
    """Apply the recipe's edit to a trained model that no engine has split."""
    section = prepared.recipe.edit
    if section is None or not prepared.recipe.trains:  # an edit that stands alone has been made
        return model
    given = {
        "tuned": model,
        "data": {name: stream.examples for name, stream in prepared.streams.items()},
    }
    adapted = hasattr(model, "peft_config")  # the weights below adapters are still the first ones
    start = plain(model) if adapted else models.load_model(prepared.source, device="cpu")
    return EDITS[section.name](start, given, **section.hyper)


def require_ready(prepared: Prepared, model: Any, weights_hash: str) -> None:
    """Refuse an edit that cannot be made of this model, before anything is measured.

    Of adapters only once they are there, in :func:`edited`.

    Raises:
        UserError: as the edit says.
    """
    section = prepared.recipe.edit
    if section is None or prepared.recipe.model.lora:
        return
    if (ready := EDITS[section.name].ready) is None:
        return
    retain, hyper = prepared.streams["retain"].examples, EDITS[section.name].filled(section.hyper)
    ready(model, retain, hyper, seed=prepared.recipe.seed, start=weights_hash)


def edited(
    prepared: Prepared,
    model: Any,
    listen: Callable[[dict[str, Any]], None],
    *,
    weights_hash: str,
    folder: RunFolder,
) -> tuple[Any, dict[str, Any]]:
    """Apply an edit that trains nothing, on every process alike; give the model and a summary.

    What it has added to the weights, where it tells (``update``), is kept in a file of the folder.
    So are the steps it has taken, until it is done. What else has come of it (``outcome``) goes
    into the summary as it is. Where it changes adapters, these are on the model.
    """
    section = prepared.recipe.edit
    assert section is not None
    steps: list[int] = []
    told: dict[str, dict[str, Any]] = {"update": {}, "outcome": {}}

    def hear(event: dict[str, Any]) -> None:
        if event["event"] in told:
            kept = {key: value for key, value in event.items() if key != "event"}
            told[event["event"]].update(kept)
            return
        steps.extend([event["step"]] if event["event"] == "step" else [])
        listen(event)

    hear({"event": "stage", "stage": "edit", "name": section.name})
    model = to_edit(prepared.recipe, model)
    given = {
        "data": {name: stream.examples for name, stream in prepared.streams.items()},
        "tokenizer": prepared.tokenizer,
        "listen": hear,
        "seed": prepared.recipe.seed,
        "keep": folder.edit_steps,
    }
    with models.recomputed(model, on=prepared.recipe.training.gradient_checkpointing):
        model = EDITS[section.name](model, given, **section.hyper)
    memory = monitors.peak_memory_bytes()
    summary = {"edit": section.name, "steps": len(steps), "peak_memory_bytes": memory}
    summary |= told["outcome"]
    if changed := told["update"]:
        about = {"edit": section.name, "hyper": section.hyper, "start": weights_hash}
        summary |= Ranks.world().first(lambda: _keep_update(changed, about, folder.update))
    return model, summary


def _keep_update(changed: dict[str, Any], about: dict[str, Any], place: Path) -> dict[str, Any]:
    """Write what an edit has added; give what else it tells of that, for the results."""
    parts = ("weights", "remainders", "rank")
    weights, remainders, rank = (changed.get(part) for part in parts)
    told = {key: value for key, value in changed.items() if key not in parts}
    kept = weights.kept if isinstance(weights, LowRank) else weights or {}
    update = Update(LowRank(kept), about, remainders or {})
    if rank is not None:
        update = update.of_rank(rank)
        told |= {key: update.about[key] for key in ("rank", "relative_error")}
    save_update(update, place)
    return told


def assistant_of(prepared: Prepared) -> Assistant | None:
    """Give the recipe's assistant as the library's own type."""
    section = prepared.recipe.assistant
    if section is None:
        return None
    hyper = settings(section.combine, section.model_dump())
    return Assistant(section.layers, section.combine, hyper)


def lora_of(recipe: Recipe) -> models.Lora | None:
    """Give the recipe's adapter settings as the library's own type."""
    section = recipe.model.lora
    if section is None:
        return None
    targets = section.targets if isinstance(section.targets, str) else tuple(section.targets)
    return models.Lora(section.rank, section.alpha, section.dropout, targets)


def _check_terms(prepared: Prepared, assistant: Assistant) -> None:
    """Refuse terms that this assistant cannot be trained on."""
    for objective in (term.objective for term in prepared.terms):
        if objective.reads == "hidden":
            raise UserError(
                f"objective {objective.name} reads a layer, which an assistant does not change",
                "use one that reads scores",
            )
        if objective.uses_reference and assistant.combine in ALONE:
            raise UserError(
                f"objective {objective.name} compares with the model at the start, but this "
                f"assistant is trained by itself (assistant.combine: {assistant.combine})",
                "use one without a reference, or assistant.combine: offset",
            )
