"""What a run would cost, from the configuration alone: the model is built on the meta device."""

import shutil
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers.trainer_utils import SaveStrategy

from unlearn import models
from unlearn.errors import UserError
from unlearn.monitors import peak_memory_bytes
from unlearn.packing import can_pack, packable
from unlearn.ranks import Ranks
from unlearn.recipes.clamp_plan import clamp_bytes, clamp_tokens
from unlearn.recipes.communication import described, traffic
from unlearn.recipes.edit_memory import edit_settings, readings
from unlearn.recipes.estimate import Estimate, Sized, estimate, for_its_device, training_of
from unlearn.recipes.fitting import fit
from unlearn.recipes.footprint import Footprint
from unlearn.recipes.inputs import dictionaries_of, update_of
from unlearn.recipes.memory import Part, Training, held
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.sections import LaunchSection
from unlearn.recipes.subset import choice_plan
from unlearn.recipes.train import make_trainer
from unlearn.runs import RunFolder


def plan_run(prepared: Prepared) -> dict[str, Any]:
    """Give steps, tokens, parameters, memory, communication and files; loads no weights.

    ``memory`` lists what one device holds at its peak in training, and adds up to
    ``memory_bytes``; ``stages`` are the peaks of all stages of a run, ``host`` those of one node's
    own memory. ``fit`` compares them with what is there.
    """
    prepared = for_its_device(prepared)
    recipe = prepared.recipe
    sized = Sized.of(prepared)
    size = sized.size
    how = training_of(prepared)
    stages = [stage for stage in (prepared.first, prepared) if stage]
    largest = max(stages, key=lambda stage: estimate(stage, sized).training)
    found = estimate(largest, sized)
    needed, files = _files(prepared, size, how)
    existing = _existing(Path(str(recipe.out)).absolute())
    return {
        "method": recipe.method,
        "engine": how.engine,
        "processes": how.processes,
        "device": found.device,
        "dtype": str(models.resolve_dtype(recipe.model.dtype)).removeprefix("torch."),
        "edit": None if recipe.trains or recipe.edit is None else recipe.edit.name,
        "anchor": prepared.anchor,
        "first_steps": prepared.first.steps if prepared.first else 0,
        "first_tokens": _tokens(prepared.first)["total"] if prepared.first else 0,
        "steps": _steps(prepared),
        "selection": choice_plan(prepared),
        "tokens": _tokens(prepared),
        "parameters": {"total": size.parameters, "trainable": size.trainable},
        **_memory(found),
        "fit": fit(largest, sized),
        "communication": _communication(size, how),
        "files": files,
        "disk": {"needed_bytes": needed, "free_bytes": shutil.disk_usage(existing).free},
    }


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _memory(found: Estimate) -> dict[str, Any]:
    def plain(parts: list[Part], name: str) -> list[dict[str, Any]]:
        return [{name: part.part, "bytes": round(part.bytes), "why": part.why} for part in parts]

    parts = plain(found.parts, "part")
    return {
        "memory": parts,
        "memory_bytes": sum(part["bytes"] for part in parts),
        "stages": plain(found.stages, "stage"),
        "peak": {"stage": found.peak.part, "bytes": round(found.peak.bytes)},
        "host": plain(found.host, "stage"),
    }


def _communication(size: Footprint, how: Training) -> dict[str, Any]:
    weights, trained = held(size, how)
    passes = 3 if how.reference == "adapters" else 2
    parts = traffic(
        how.engine,
        how.processes,
        weights=weights,
        gradients=trained,
        accumulation=how.accumulation,
        passes=passes,
        sync_each=how.sync_each,
    )
    return described(parts)


def require_disk(planned: dict[str, Any]) -> None:
    """Refuse a run whose files do not fit.

    Raises:
        UserError: with what is needed and what is free.
    """
    disk = planned["disk"]
    if disk["needed_bytes"] > disk["free_bytes"]:
        needed, free = (round(disk[key] / 2**20, 1) for key in ("needed_bytes", "free_bytes"))
        raise UserError(
            f"the run would write {needed} MiB, but only {free} MiB are free",
            "free some space, choose another --out, or lower training.save_total_limit",
        )


def measure_step(prepared: Prepared, *, repeats: int = 3) -> dict[str, Any]:
    """Load the model, do a few real optimiser steps in memory and time them; nothing is kept.

    Outside of a launch one process is measured, with its share of the step and no engine.
    """
    if not prepared.recipe.trains:
        raise UserError(
            "an edit trains nothing, so there are no steps to be timed", "leave --measure out"
        )
    processes = Ranks.world().size
    here = prepared if processes > 1 else _alone(prepared)
    model = models.load_model(here.source)
    ends: list[tuple[float, int]] = []

    def tick(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            ends.append((time.monotonic(), event["tokens"]))

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            here, model, RunFolder(Path(folder)), weights_hash="measure", emit=tick
        )
        trainer.args.max_steps = repeats + 1
        trainer.args.save_strategy = SaveStrategy.NO
        with packable(trainer.model) if can_pack(trainer.model) else nullcontext():
            trainer.train()
    seconds = statistics.median(b[0] - a[0] for a, b in pairwise(ends))
    tokens = (ends[-1][1] - ends[0][1]) / (ends[-1][0] - ends[0][0])
    return {
        "processes": processes,
        "seconds_per_step": seconds,
        "steps_per_second": 1 / seconds,
        "tokens_per_second": tokens,
        "tokens_per_second_per_device": tokens / processes,
        "estimated_seconds": seconds * prepared.steps,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _alone(prepared: Prepared) -> Prepared:
    """Give one process its own share of every step: the same micro-batches, nobody to talk to."""
    recipe = prepared.recipe
    training = {"global_batch_size": None, "gradient_accumulation_steps": recipe.accumulation}
    changes = {
        "launch": LaunchSection(),
        "training": recipe.training.model_copy(update=training),
    }
    return replace(prepared, recipe=recipe.model_copy(update=changes))


def _steps(prepared: Prepared) -> dict[str, int]:
    recipe = prepared.recipe
    return {
        "total": prepared.steps,
        "per_epoch": prepared.steps_per_epoch,
        "effective_batch": prepared.rows_per_step,
        "per_device": recipe.training.per_device_train_batch_size,
        "accumulation": recipe.accumulation,
        "processes": recipe.launch.processes,
    }


def _tokens(prepared: Prepared) -> dict[str, int]:
    """Count expected real (not padding) tokens; every forget row brings one row of each stream."""
    if not prepared.recipe.trains:
        return _edited_tokens(prepared)
    means = [
        statistics.mean(len(example.input_ids) for example in stream.examples)
        for stream in prepared.trained.values()
    ]
    rows: float = min(prepared.rows_per_step, len(prepared.streams[prepared.anchor].examples))
    chosen = choice_plan(prepared)
    if chosen and "passes" in chosen:  # the last step of a pass takes what is left of the rows
        rows = chosen["rows"] * chosen["passes"] / prepared.steps
    per_step = round(sum(means) * rows)
    return {"per_step": per_step, "total": per_step * prepared.steps}


def _edited_tokens(prepared: Prepared) -> dict[str, int]:
    """Count what an edit passes over there and back; the first step has nothing to correct.

    A search for the scale of an update reads both before the first trial, and after every one.
    """
    forget, retain = (
        sum(len(row.input_ids) for row in prepared.streams[name].examples)
        for name in ("forget", "retain")
    )
    if dictionaries_of(prepared.recipe):
        return clamp_tokens(prepared)
    if update_of(prepared.recipe):
        return {"per_step": forget + retain, "total": readings(prepared) * (forget + retain)}
    how, steps = edit_settings(prepared), prepared.steps
    fits, corrections = steps if how["refit"] else 1, (steps - 1) * how["correct"]
    total = forget * steps + retain * (fits + corrections)
    return {"per_step": forget + retain * (how["refit"] + how["correct"]), "total": total}


def _files(prepared: Prepared, size: Footprint, how: Training) -> tuple[int, list[dict[str, Any]]]:
    """List what is written; a checkpoint holds the weights that are trained and their states.

    Without adapters a checkpoint holds the frozen weights as well. DeepSpeed's holds its fp32 copy.
    """
    recipe = prepared.recipe
    keep = recipe.training.save_total_limit or prepared.steps
    weights, trained = held(size, how)
    zero = how.engine.startswith("zero")
    states = how.states * (4 * size.trainable if zero else trained)
    copy = 4 * size.trainable if zero else 0
    checkpoint = (trained if recipe.model.lora else weights) + states + copy
    reference = 4 * sum(len(e.input_ids) for s in prepared.streams.values() for e in s.examples)
    whole = size.parameters * models.resolve_dtype(recipe.model.dtype).itemsize
    sizes = {
        "recipe.yaml, manifest.json, events.jsonl": 2048 + 256 * prepared.steps,
        "checkpoints/": checkpoint * (keep + 1),
        "model/": size.trained if recipe.assistant else whole,
        "evals/, report.html, report.md, results.json": 2**20,
    }
    if not recipe.trains:  # nothing is kept on the way
        del sizes["checkpoints/"]
        reference = 0
        if dictionaries_of(recipe):
            sizes["model/"] = clamp_bytes(prepared)
        else:  # at most: of changed weights, in fp32
            changed = size.trainable if recipe.model.lora else size.parameters
            sizes["update.safetensors"] = 4 * changed
    if recipe.model.lora and not recipe.assistant:
        sizes["adapter/"] = size.trained
    if recipe.evals.select_best:
        sizes["best/"] = size.trained
    rounded = {path: round(each) for path, each in sizes.items()}
    files = [{"path": path, "bytes": each} for path, each in rounded.items()]
    return sum(rounded.values()) + reference, files
