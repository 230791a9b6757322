"""The stage that a recipe trains first: a model of its own in the run folder, and what follows it.

``first/`` holds its checkpoints and, once it is done, its model, on which the recipe's own training
begins. A resumed run goes on in the stage it was in.
"""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unlearn import models, monitors
from unlearn.ranks import Ranks
from unlearn.recipes import outcome
from unlearn.recipes.prepare import Prepared, sibling
from unlearn.recipes.train import train, whole_model
from unlearn.runs import RunFolder, staged, write_json

Emit = Callable[[dict[str, Any]], None]


def train_first(
    prepared: Prepared,
    model: Any,
    folder: RunFolder,
    *,
    weights_hash: str,
    stop: monitors.StopRequest,
    emit: Emit,
) -> tuple[Any, dict[str, Any]]:
    """Train the first stage, unless it is done; give the model to go on with, and a summary."""
    stage, inner = prepared.first, RunFolder(folder.path / "first")
    summary = inner.path / "training.json"
    assert stage is not None
    if not inner.model.is_dir():
        told = _within(emit, before=0, after=prepared.steps)
        model, found = train(stage, model, inner, weights_hash=weights_hash, stop=stop, emit=told)
        told({"event": "stage", "stage": "save", "name": "first"})
        whole = whole_model(stage, model)
        Ranks.world().first(lambda: _write(stage, whole, inner, summary, found))
    del model
    gc.collect()
    start = models.load_model(sibling(prepared.source, str(inner.model)))
    return start, dict(json.loads(summary.read_text()))


def _write(
    stage: Prepared, model: Any, inner: RunFolder, summary: Path, found: dict[str, Any]
) -> None:
    write_json(summary, found)
    with staged(inner.model) as staging:
        outcome.save(stage, model, staging, inner.adapter)


def after_first(emit: Emit, steps: int) -> Emit:
    """Number the steps of the recipe's own training on from those of the first stage."""
    return _within(emit, before=steps, after=0)


def _within(emit: Emit, *, before: int, after: int) -> Emit:
    """Number the steps of one stage as steps of the whole run."""

    def shifted(event: dict[str, Any]) -> None:
        if "step" in event:
            event = event | {"step": event["step"] + before}
        if "of" in event:
            event = event | {"of": event["of"] + before + after}
        emit(event)

    return shifted
