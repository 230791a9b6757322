"""What a run would cost, from the configuration alone: the model is built on the meta device."""

import shutil
import statistics
import tempfile
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.trainer_utils import SaveStrategy

from unlearn import models
from unlearn.errors import UserError
from unlearn.head import CHUNK_BYTES
from unlearn.monitors import peak_memory_bytes
from unlearn.objectives import OBJECTIVES
from unlearn.packing import can_pack, packable
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.train import choose_trained, lora_of, make_trainer, needs_live

OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "adamw": 2, "lion": 1, "rmsprop": 1}


def plan_run(prepared: Prepared) -> dict[str, Any]:
    """Give steps, tokens, parameters, memory by part (bytes) and files; loads no weights."""
    recipe = prepared.recipe
    model = meta_model(prepared)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = _memory(prepared, model, total, trainable)
    needed, files = _files(prepared, total, trainable)
    out = Path(str(recipe.out))
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    return {
        "method": recipe.method,
        "device": models.best_device(),
        "dtype": str(models.resolve_dtype(recipe.model.dtype)).removeprefix("torch."),
        "steps": _steps(prepared),
        "tokens": _tokens(prepared),
        "parameters": {"total": total, "trainable": trainable},
        "memory": memory,
        "memory_bytes": sum(part["bytes"] for part in memory),
        "files": files,
        "disk": {"needed_bytes": needed, "free_bytes": shutil.disk_usage(existing).free},
    }


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


def meta_model(prepared: Prepared) -> Any:
    """Build the model, with its adapters, without memory for weights."""
    source = prepared.source
    config = AutoConfig.from_pretrained(source.path, **source.arguments())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=models.resolve_dtype(source.dtype),
            trust_remote_code=source.trust_remote_code,
        )
        choose_trained(prepared, model)
        lora = lora_of(prepared)
        return models.add_lora(model, lora) if lora else model


def measure_step(prepared: Prepared, *, repeats: int = 3) -> dict[str, Any]:
    """Load the model, do a few real optimiser steps in memory and time them; nothing is kept."""
    model = models.load_model(prepared.source)
    times: list[float] = []

    def tick(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            times.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(prepared, model, Path(folder), weights_hash="measure", emit=tick)
        trainer.args.max_steps = repeats + 1
        trainer.args.save_strategy = SaveStrategy.NO
        with packable(trainer.model) if can_pack(trainer.model) else nullcontext():
            trainer.train()
    seconds = statistics.median(b - a for a, b in pairwise(times))
    return {
        "seconds_per_step": seconds,
        "estimated_seconds": seconds * prepared.steps,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _steps(prepared: Prepared) -> dict[str, int]:
    training = prepared.recipe.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return {
        "total": prepared.steps,
        "per_epoch": prepared.steps_per_epoch,
        "effective_batch": batch,
    }


def _tokens(prepared: Prepared) -> dict[str, int]:
    """Count expected real (not padding) tokens; every forget row brings one retain row."""
    training = prepared.recipe.training
    means = [
        statistics.mean(len(example.input_ids) for example in stream.examples)
        for stream in prepared.streams.values()
    ]
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    per_step = round(sum(means) * min(batch, len(prepared.streams["forget"].examples)))
    return {"per_step": per_step, "total": per_step * prepared.steps}


def _memory(prepared: Prepared, model: Any, total: int, trainable: int) -> list[dict[str, Any]]:
    recipe = prepared.recipe
    width = next(model.parameters()).element_size()
    base = 0.55 if recipe.model.quantize else width
    states = next(
        (n for name, n in OPTIMIZER_STATES.items() if recipe.training.optim.startswith(name)), 2
    )
    copied = needs_live(prepared) and not recipe.model.lora
    parts = [
        ("weights", total * base, f"{total:,} parameters"),
        ("gradients", trainable * width, f"{trainable:,} trainable"),
        (
            "optimizer",
            trainable * width * states,
            f"{recipe.training.optim}: {states} per parameter",
        ),
        ("activations", *_activations(prepared, model, width)),
        ("head", *_head(prepared, model)),
        ("reference", trainable * width if copied else 0, _reference_reason(prepared, copied)),
    ]
    return [{"part": part, "bytes": round(size), "why": why} for part, size, why in parts]


def _reference_reason(prepared: Prepared, copied: bool) -> str:
    if copied:
        return "a frozen copy of what is trained"
    if any(term.objective.uses_reference for term in prepared.terms):
        return (
            "adapters switched off" if needs_live(prepared) else "cached on disk, no second model"
        )
    return "no term needs one"


def _longest(prepared: Prepared) -> tuple[int, int]:
    """Give rows per forward pass and the longest row: the worst micro-batch."""
    rows = prepared.recipe.training.per_device_train_batch_size * len(prepared.streams)
    longest = max(len(e.input_ids) for s in prepared.streams.values() for e in s.examples)
    return rows, longest


def _activations(prepared: Prepared, model: Any, width: int) -> tuple[float, str]:
    """Estimate what the backward pass keeps: per token and layer 17 hidden-sized values.

    Korthikanti et al. 2022 (arXiv:2205.05198) count 34 bytes per hidden unit in 16 bits without
    the attention matrix, which fused attention does not keep.
    """
    config = model.config.get_text_config()
    rows, longest = _longest(prepared)
    tokens, hidden = rows * longest, config.hidden_size
    if prepared.recipe.training.gradient_checkpointing:
        kept = tokens * hidden * width * (config.num_hidden_layers + 17)
        return kept, f"{rows} rows of {longest} tokens, checkpointed"
    kept = tokens * hidden * width * 17 * config.num_hidden_layers
    return kept, f"{rows} rows of {longest} tokens, {config.num_hidden_layers} layers"


def _head(prepared: Prepared, model: Any) -> tuple[float, str]:
    rows, longest = _longest(prepared)
    vocabulary = model.config.get_text_config().vocab_size
    if any(OBJECTIVES[term.objective.name].reads == "logits" for term in prepared.terms):
        return (
            4.0 * rows * longest * vocabulary * 3,
            "full logits: a term reads whole distributions",
        )
    return min(2.0 * CHUNK_BYTES, 8.0 * rows * longest * vocabulary), "logits in chunks"


def _files(prepared: Prepared, total: int, trainable: int) -> tuple[int, list[dict[str, Any]]]:
    width = models.resolve_dtype(prepared.recipe.model.dtype).itemsize
    keep = prepared.recipe.training.save_total_limit or prepared.steps
    checkpoint = trainable * width * 3
    reference = 4 * sum(len(e.input_ids) for s in prepared.streams.values() for e in s.examples)
    sizes = {
        "recipe.yaml, manifest.json, events.jsonl": 2048 + 256 * prepared.steps,
        "checkpoints/": checkpoint * (keep + 1),
        "model/": total * width,
        "evals/, report.html, report.md, results.json": 2**20,
    }
    if prepared.recipe.model.lora:
        sizes["adapter/"] = trainable * width
    files = [{"path": path, "bytes": size} for path, size in sizes.items()]
    return sum(sizes.values()) + reference, files
