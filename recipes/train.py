"""From a prepared recipe and a loaded model to a trained one: reference, arguments, trainer."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from unlearn import checkpoints, models, monitors, reference
from unlearn.activations import check_layer
from unlearn.data.collate import Collator, EpochSampler
from unlearn.engines import SHARDED, engine_arguments, is_sharded, put_trained, trained_weights
from unlearn.errors import Interrupted
from unlearn.packing import can_pack, packable
from unlearn.posttrain.collapse import CollapseGuard
from unlearn.ranks import Ranks
from unlearn.recipes import outcome
from unlearn.recipes.identity import training_identity
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.selection import best_step
from unlearn.runs import RunFolder, cache_folder
from unlearn.scores import Scorer
from unlearn.training import UnlearningTrainer

Emit = Callable[[dict[str, Any]], None]
FIRST_ROWS = 64
"""Rows over which the frozen start is measured."""


def train(
    prepared: Prepared,
    model: Any,
    folder: RunFolder,
    *,
    weights_hash: str,
    stop: monitors.StopRequest,
    emit: Emit,
    on_step: Callable[[Any, int], object] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Train (or continue from the newest usable checkpoint); give the model and a summary.

    Raises:
        Interrupted: a stop was requested; the last step is saved.
        RunFailed: non-finite gradients, or nothing moves.
        UserError: there are checkpoints, but none can be used.
    """
    trainer = make_trainer(prepared, model, folder, weights_hash=weights_hash, emit=emit)
    ranks = Ranks.world()
    stop.agree = ranks.any
    trainer.add_callback(stop)
    every = prepared.recipe.evals.every
    if every and on_step:

        def measure(step: int) -> None:
            with outcome.as_after(prepared, trainer.model) as measured:
                on_step(measured, step)

        trainer.add_callback(monitors.EverySteps(every, measure))
    last = _found_checkpoint(folder.checkpoints, trainer.keeping.identity, emit)
    for message in cautions(prepared):
        emit({"event": "warning", "message": message})
    stage = "post-train" if prepared.recipe.posttrains else "train"
    emit({"event": "stage", "stage": stage, "resumed_from": last and last.name})
    _train_from(trainer, last, prepared.steps)
    unset_hf_deepspeed_config()  # else models loaded from now on would be split by ZeRO 3
    if stop.requested:
        emit({"event": "interrupted", "step": trainer.state.global_step})
        before = prepared.first.steps if prepared.first else 0
        done = before + trainer.state.global_step
        raise Interrupted(f"stopped after step {done}, which is saved")
    summary = {"steps": trainer.state.global_step, "peak_memory_bytes": peak_memory(ranks)}
    if pruner := trainer.pruner:
        summary |= {"rows": pruner.visits, "rows_unpruned": pruner.size * pruner.epochs}
    return outcome.trained(prepared, trainer.model), summary


FEW = 8
"""Rows below which weights say little: the lowest and the highest loss always stand at the ends."""


def cautions(prepared: Prepared) -> Iterator[str]:
    """Say what is allowed and seldom wanted: few rows to weigh, answers that are cut off."""
    recipe = prepared.recipe
    at_once = recipe.training.per_device_train_batch_size * recipe.launch.processes
    for term in prepared.terms:
        beside = {"micro": at_once, "step": prepared.rows_per_step}
        if term.weighting and (rows := beside.get(term.weighting.scope, FEW)) < FEW:
            yield (
                f"terms on {term.on}: {rows} rows are weighted against each other, where "
                f"{FEW} or more are needed for weights that mean something (scope: step or stream)"
            )
    if not recipe.posttrains:
        return
    for name, stream in prepared.trained.items():
        if cut := sum(example.cut > 0 for example in stream.examples):
            yield (
                f"{cut} of {len(stream.examples)} rows of '{name}' are cut at data.max_length "
                f"{recipe.data.max_length}: their answers never end"
            )


def whole_model(prepared: Prepared, model: Any) -> Any:
    """Give a trained model as one process can save it; every process must call this.

    Weights that an engine has split are put together on the CPU of rank 0; the others get None.
    """
    if not is_sharded(model):
        return model
    first = Ranks.world().rank == 0
    weights = trained_weights(model, keep=first)
    if not first:
        return None
    fresh = models.load_model(prepared.source, device="cpu")
    choose_trained(prepared, fresh)
    fresh = outcome.to_train(prepared, fresh)
    put_trained(fresh, weights)
    return fresh


def peak_memory(ranks: Ranks) -> int:
    """Give the most memory that any process of the launch has held."""
    mine = torch.zeros(ranks.size, dtype=torch.long)
    mine[ranks.rank] = monitors.peak_memory_bytes()
    return int(ranks.add(mine).max())


def _found_checkpoint(
    folder: Path, identity: checkpoints.Identity | None, emit: Emit
) -> Path | None:
    """Choose where to go on from; one process looks, and says what is passed over and why."""

    def look() -> tuple[str | None, list[str]]:
        checkpoints.clean(folder)
        return checkpoints.choose(folder, identity)

    found, passed = Ranks.world().first(look)
    for message in passed:
        emit({"event": "warning", "message": message})
    return folder / found if found else None


def _train_from(trainer: UnlearningTrainer, last: Path | None, steps: int) -> None:
    """Train, or go on from a checkpoint; one that holds all steps is only loaded.

    (transformers would do one step more when such a run ended in the middle of an epoch.)
    """
    state = last and TrainerState.load_from_json(str(last / "trainer_state.json"))
    if last and state and state.global_step >= steps:
        trainer._load_from_checkpoint(str(last))
        trainer.state = state
        return
    with packable(trainer.model) if can_pack(trainer.model) else nullcontext():
        trainer.train(resume_from_checkpoint=str(last) if last else None)


def make_trainer(
    prepared: Prepared, model: Any, folder: RunFolder, *, weights_hash: str, emit: Emit
) -> UnlearningTrainer:
    """Build the trainer: adapters, scorer with its self-check, reference, data and callbacks."""
    recipe = prepared.recipe
    prepared = measure_start(prepared, model)
    choose_trained(prepared, model)
    scorer = Scorer.for_model(model)
    stored = _stored_reference(prepared, model, scorer, weights_hash, emit)
    if prepared.recipe.model.lora:
        model = outcome.to_train(prepared, model)
        scorer = Scorer.for_model(model)
    trainer = UnlearningTrainer(
        model=model,
        args=training_arguments(prepared, folder.checkpoints),
        train_dataset=prepared.dataset,
        data_collator=Collator(prepared.pad_id, stored),
        terms=prepared.terms,
        scorer=scorer,
        live=_live_reference(prepared, model),
        keeping=checkpoints.Keeping(
            recipe.training.save_total_limit,
            training_identity(prepared, weights_hash),
            lambda: best_step(folder.best),
        ),
        pruner=prepared.pruner,
        apart=recipe.training.passes == "apart",
    )
    trainer.remove_callback(PrinterCallback)
    hidden = prepared.engine.startswith("zero")
    trainer.add_callback(monitors.UpdateCheck(emit, hidden, Ranks.world().add))
    trainer.add_callback(monitors.StepEvents(emit, trainer.summary, lambda: trainer.num_tokens))
    if recipe.posttrains and "rejected" in prepared.trained:
        how = recipe.training.collapse.model_dump()
        trainer.add_callback(CollapseGuard(emit, trainer.summary, **how))
    return trainer


def measure_start(prepared: Prepared, model: Any) -> Prepared:
    """Fill in what terms ask of the frozen start, where neither recipe nor run has it yet.

    That is the mean token norm after a layer, for a vector that is to suit it. It is taken over the
    first :data:`FIRST_ROWS` rows of the first epoch, in the order of training, on one process: so
    it depends on the seed and the rows, not on batch size, accumulation or number of processes.
    """
    found = dict(prepared.measured)
    for term in prepared.terms:
        name = term.objective.measured
        if name and term.hyper.get(name) is None and term.layer is not None:
            check_layer(model, term.layer)
            dataset = prepared.dataset
            order = islice(EpochSampler(len(dataset), seed=dataset.seed), FIRST_ROWS)
            rows = [dataset[at][term.on].example for at in order]
            measure = partial(reference.mean_token_norm, model, rows, term.layer)
            found[term.label] = {name: Ranks.world().first(measure)}
    return replace(prepared, measured=found)


def _stored_streams(prepared: Prepared) -> set[str]:
    """Name the streams whose reference is a list of stored token log-probs."""
    if prepared.recipe.training.reference == "live":
        return set()
    asking = [term for term in prepared.terms if term.objective.uses_reference]
    live = {s for term in asking if term.objective.reads != "scores" for s in term.streams}
    return {stream for term in asking for stream in term.streams} - live


def choose_trained(prepared: Prepared, model: Any) -> None:
    """Freeze what the recipe does not train, and check the layers that its terms read."""
    if patterns := prepared.recipe.training.trainable:
        models.train_only(model, patterns)
    for term in prepared.terms:
        if term.layer is not None:
            check_layer(model, term.layer)


def needs_live(prepared: Prepared) -> bool:
    """Tell whether a term must ask the frozen starting model during training."""
    asking = {s for t in prepared.terms if t.objective.uses_reference for s in t.streams}
    return bool(asking - _stored_streams(prepared))


def _live_reference(prepared: Prepared, model: Any) -> reference.LiveReference | None:
    if not needs_live(prepared):
        return None
    return reference.LiveReference.of(model, share=prepared.engine not in SHARDED)


def _stored_reference(
    prepared: Prepared, model: Any, scorer: Scorer, weights_hash: str, emit: Emit
) -> dict[str, Any]:
    stored = {}
    for name in sorted(_stored_streams(prepared)):
        emit({"event": "stage", "stage": "reference", "stream": name})

        def report(done: int, total: int, what: str = f"reference on {name}") -> None:
            emit({"event": "progress", "what": what, "done": done, "total": total})

        stored[name] = reference.stored_rows(
            scorer,
            model,
            prepared.streams[name].examples,
            weights_hash=weights_hash,
            folder=cache_folder(),
            pad_id=prepared.pad_id,
            batch_tokens=prepared.recipe.evals.batch_tokens,
            progress=report,
        )
    return stored


def training_arguments(prepared: Prepared, folder: Path) -> TrainingArguments:
    """Hand the recipe's training section to transformers; the pipeline owns the rest."""
    section = prepared.recipe.training
    passed = section.model_dump(
        exclude={
            "warmup_epochs",
            "warmup_steps",
            "save_steps",
            "save_total_limit",
            "reference",
            "trainable",
            "gradient_checkpointing",
            "passes",
            "global_batch_size",
            "collapse",
            "prune",
            "gradient_accumulation_steps",
        }
    )
    bf16 = models.resolve_dtype(prepared.recipe.model.dtype) == torch.bfloat16
    passed |= engine_arguments(prepared.engine, bf16=bf16 or bool(section.extras.get("bf16")))
    if section.gradient_checkpointing:
        passed |= _checkpointing()
    chosen = prepared.recipe.data.select is not None
    if section.prune:  # all epochs are one pass over the sampler
        passed["num_train_epochs"] = 1
    if chosen:  # as many steps as over the whole forget set, saved as often
        passed["max_steps"] = prepared.steps
    warmup = section.warmup_steps
    if warmup is None:
        warmup = round(section.warmup_epochs * prepared.steps_per_epoch)
    return TrainingArguments(
        output_dir=str(folder),
        warmup_steps=warmup,
        gradient_accumulation_steps=prepared.recipe.accumulation,
        save_strategy="steps" if section.save_steps or chosen or section.prune else "epoch",
        save_steps=section.save_steps or prepared.steps_per_epoch,
        seed=prepared.recipe.seed,
        data_seed=prepared.recipe.seed,
        remove_unused_columns=False,
        logging_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=models.best_device() == "cpu",
        disable_tqdm=True,
        **passed,
    )


def _checkpointing() -> dict[str, Any]:
    """Ask for activation checkpointing under the name this transformers knows."""
    names = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
