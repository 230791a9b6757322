"""The selectors of ``data.select``, each as one function of a prepared recipe and its model."""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy

from unlearn import selection
from unlearn.engines import put_trained, trained_weights
from unlearn.errors import RunFailed, UserError
from unlearn.keywords import keyword_positions, word_positions
from unlearn.ranks import Ranks
from unlearn.recipes.choice import ChoiceSection, Selector
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.subset import Selected, read_given, rows_sha256
from unlearn.recipes.train import make_trainer
from unlearn.runs import RunFolder

Emit = Callable[[dict[str, Any]], None]
ONE_PROCESS: tuple[Selector, ...] = ("grand", "worst")
"""Selectors that go back through the model, which several processes would each do in full."""


def check_choice(prepared: Prepared) -> None:
    """Refuse a selection that would fail once the model is loaded.

    Raises:
        UserError: a manifest of other rows, a word that stands nowhere, several processes.
    """
    section = prepared.recipe.data.select
    if section is None:
        return
    read_given(prepared)
    if section.keywords:
        word_positions(prepared.streams["forget"].examples, section.keywords, prepared.tokenizer)
    if section.by in ONE_PROCESS and prepared.recipe.launch.processes > 1:
        raise UserError(
            f"data.select.by {section.by} needs one process, not "
            f"{prepared.recipe.launch.processes}",
            "select first with `unlearn data select`, then give the file with --forget-indices",
        )


def select(prepared: Prepared, model: Any, *, weights_hash: str, emit: Emit) -> Selected:
    """Choose the rows that the recipe asks for; the model is left as it was.

    Raises:
        UserError: the selection cannot be made.
        RunFailed: the model gives a row no score.
    """
    section = prepared.recipe.data.select
    assert section is not None
    if given := read_given(prepared):
        return given
    emit({"event": "stage", "stage": "select", "name": section.by})
    if section.by == "keyword":
        found = _keywords(prepared, section)
    else:
        found = _ranked(prepared, model, section, weights_hash, emit)
    set_seed(prepared.recipe.seed)  # what was drawn here must not change the training
    # one process decides: the last digits of a score may differ between devices
    rows, labels = Ranks.world().first(lambda: (found.indices, found.labels))
    return replace(found, indices=rows, labels=labels, model_sha256=weights_hash)


def _seed(prepared: Prepared, section: ChoiceSection) -> int:
    return prepared.recipe.seed if section.seed is None else section.seed


def _selected(prepared: Prepared, section: ChoiceSection, **found: Any) -> Selected:
    forget = prepared.streams["forget"]
    return Selected(
        num_rows=len(forget.rows),
        by=section.by,
        settings={k: v for k, v in section.settings().items() if k != "by"},
        seed=_seed(prepared, section) if section.by in ("random", "moderate") else None,
        rows_sha256=rows_sha256(forget),
        tokens_sha256=forget.sha256(),
        **found,
    )


def _keywords(prepared: Prepared, section: ChoiceSection) -> Selected:
    forget = prepared.streams["forget"]
    scores = None
    if section.keywords:
        places = word_positions(forget.examples, section.keywords, prepared.tokenizer)
    else:
        assert section.fraction is not None
        retain = prepared.streams["retain"].examples
        places, odds = keyword_positions(forget.examples, retain, section.fraction)
        scores = _named(prepared.tokenizer, odds)
    windows: dict[int, list[list[int]]] = {}
    for example, kept in zip(forget.examples, places, strict=True):
        windows.setdefault(example.row, []).append(kept)
    rows = sorted(row for row, parts in windows.items() if any(parts))
    labels = [windows[row] for row in rows]
    return _selected(prepared, section, indices=rows, labels=labels, scores=scores)


def _named(tokenizer: Any, odds: dict[int, float]) -> dict[str, float]:
    """Give each token's text with its score, the highest first, so that a person can look."""
    order = sorted(odds, key=lambda token: -odds[token])
    return {str(tokenizer.convert_ids_to_tokens(token)): odds[token] for token in order}


def _ranked(
    prepared: Prepared, model: Any, section: ChoiceSection, weights_hash: str, emit: Emit
) -> Selected:
    def progress(done: int, total: int) -> None:
        whole = total or len(prepared.streams["forget"].examples)
        emit({"event": "progress", "what": f"{section.by}", "done": done, "total": whole})

    assert section.by is not None
    scores = SELECTORS[section.by](prepared, model, section, weights_hash, progress)
    number = selection.num_kept(len(scores), section.fraction or 1.0)
    try:
        rows = selection.highest(scores, number)
    except ValueError as error:
        raise RunFailed(f"rows cannot be selected by {section.by}: {error}") from error
    return _selected(prepared, section, indices=rows, scores=scores.tolist())


def _random(prepared: Prepared, model: Any, section: ChoiceSection, *_: Any) -> np.ndarray:
    rows = len(prepared.streams["forget"].rows)
    return selection.random_scores(rows, seed=_seed(prepared, section))


def _mink(
    prepared: Prepared, model: Any, section: ChoiceSection, _: str, progress: selection.Progress
) -> np.ndarray:
    how = _scoring(prepared, progress)
    return _by_row(prepared, selection.memorised(model, _examples(prepared), k=section.k, **how))


def _moderate(
    prepared: Prepared, model: Any, section: ChoiceSection, _: str, progress: selection.Progress
) -> np.ndarray:
    found = selection.embeddings(model, _examples(prepared), **_scoring(prepared, progress))
    rows = found.new_tensor(_by_row(prepared, found.double().numpy()))
    seed = _seed(prepared, section)
    return selection.moderate_scores(rows, clusters=section.clusters, seed=seed)


def _grand(
    prepared: Prepared,
    model: Any,
    section: ChoiceSection,
    weights_hash: str,
    progress: selection.Progress,
) -> np.ndarray:
    """Take the recipe's whole loss on each row and the retain row it meets first."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(prepared, model, folder, weights_hash)
        tensors = _weights(trainer.model, section.parameters)
        losses = _losses(trainer, len(_examples(prepared)))
        found = selection.gradient_scores(losses, tensors, progress=progress)
    _take_adapters_off(trainer.model)
    return _by_row(prepared, found)


def _losses(trainer: Any, rows: int) -> Iterator[Callable[[], Tensor]]:
    for row in range(rows):
        batch = trainer.data_collator([trainer.train_dataset[0, row]])
        yield partial(
            trainer.compute_loss,
            trainer.model,
            trainer._prepare_inputs(batch),
            num_items_in_batch=trainer._count([batch]),
        )


def _weights(model: Any, patterns: tuple[str, ...] | None) -> list[Tensor]:
    """Give the trained weights whose gradient counts.

    Raises:
        UserError: no trained weight has such a name.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in patterns or ():
        if not any(re.search(pattern, name) for name in trained):
            example = next(iter(trained))
            message = f"data.select.parameters: no trained weight matches '{pattern}'"
            raise UserError(message, f"names look like {example}")
    chosen = patterns or ("",)
    return [p for name, p in trained.items() if any(re.search(one, name) for one in chosen)]


def _worst(
    prepared: Prepared,
    model: Any,
    section: ChoiceSection,
    weights_hash: str,
    progress: selection.Progress,
) -> np.ndarray:
    """Unlearn for a few steps, score every row, and put the weights back."""
    steps = section.steps or -(-len(_examples(prepared)) // prepared.rows_per_step)
    changes = {"max_steps": steps, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    training = prepared.recipe.training.model_copy(update=changes)
    brief = replace(prepared, recipe=prepared.recipe.model_copy(update={"training": training}))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(brief, model, folder, weights_hash)
        start = trained_weights(trainer.model)
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.train()
    how = _scoring(prepared, progress)
    found = selection.mean_log_probs(trainer.model, _examples(prepared), **how)
    put_trained(trainer.model, start)
    _take_adapters_off(trainer.model)
    return _by_row(prepared, found)


def _trainer(prepared: Prepared, model: Any, folder: str, weights_hash: str) -> Any:
    """Build the trainer of the recipe on the whole forget set; what it says is not recorded."""
    quiet = RunFolder(Path(folder))
    return make_trainer(prepared, model, quiet, weights_hash=weights_hash, emit=lambda event: None)


def _take_adapters_off(model: Any) -> None:
    if hasattr(model, "unload"):
        model.unload()


def _examples(prepared: Prepared) -> list[Any]:
    return prepared.streams["forget"].examples


def _scoring(prepared: Prepared, progress: selection.Progress) -> dict[str, Any]:
    batch_tokens = prepared.recipe.evals.batch_tokens
    return {"progress": progress, "pad_id": prepared.pad_id, "batch_tokens": batch_tokens}


def _by_row(prepared: Prepared, values: ArrayLike) -> np.ndarray:
    forget = prepared.streams["forget"]
    return selection.per_row(values, forget.examples, len(forget.rows))


SELECTORS: dict[str, Callable[..., np.ndarray]] = {
    "random": _random,
    "grand": _grand,
    "moderate": _moderate,
    "mink": _mink,
    "worst": _worst,
}
