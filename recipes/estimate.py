"""The memory of a prepared run: stage by stage on each device, and in the memory of the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unlearn import models
from unlearn.data import Example
from unlearn.engines import SHARDED
from unlearn.evals.memory import scoring_bytes, writing_bytes
from unlearn.evals.retain_kl import logit_bytes
from unlearn.head import plain
from unlearn.recipes.edit_memory import edit_parts
from unlearn.recipes.footprint import Footprint, meta_model
from unlearn.recipes.memory import (
    PROCESS_BYTES,
    Batch,
    Part,
    Training,
    held,
    model_states,
    training_parts,
)
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.schema import Recipe
from unlearn.recipes.train import needs_live
from unlearn.scoring import CPU_TOKENS

WRITING_TOKENS = 4
"""Tokens of key-value cache per token of ``evals.batch_tokens`` (``evals.answers``)."""


@dataclass(frozen=True)
class Measuring:
    """What a measurement takes beside the weights: one forward pass, or a key-value cache."""

    bytes: float
    why: str


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device by part (while training) and by stage, and in the host's memory."""

    device: str
    parts: list[Part]
    stages: list[Part]
    host: list[Part]

    @property
    def training(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def peak(self) -> Part:
        """The stage that needs most of one device."""
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def host_peak(self) -> Part:
        """The stage that needs most of the host's memory."""
        return max(self.host, key=lambda stage: stage.bytes)

    @property
    def largest(self) -> Part:
        """What takes most of the peak."""
        if self.peak.part not in ("training", "editing"):
            return self.peak
        return max(self.parts, key=lambda part: part.bytes)


@dataclass(frozen=True)
class Sized:
    """A model on the meta device, and its sizes."""

    model: Any
    size: Footprint

    @classmethod
    def of(cls, prepared: Prepared) -> "Sized":
        """Build the model of a recipe and read its sizes off it; takes a second or so."""
        model = meta_model(prepared)
        quantized = bool(prepared.recipe.model.quantize)
        layers = _read_layers(prepared)
        size = Footprint.of_trained(model, quantized=quantized, read_layers=layers)
        return cls(model, size)


def _read_layers(prepared: Prepared) -> list[int]:
    """List the layers whose hidden states a term reads."""
    layers = {term.layer for term in prepared.terms}
    return sorted(layer for layer in layers if layer is not None)


def estimate(prepared: Prepared, sized: Sized) -> Estimate:
    """Put the formulas of ``unlearn.recipes.memory`` together for a run."""
    size, measuring = sized.size, _measuring(prepared, sized.model, sized.size.weights)
    how, device = training_of(prepared), device_of(prepared.recipe)
    trains = prepared.recipe.trains
    if trains:
        parts = training_parts(size, largest_batch(prepared, size), how)
    else:
        parts = edit_parts(prepared, sized.model, size, device)
    on_cpu = device == "cpu"
    if on_cpu:
        parts.insert(0, Part("process", PROCESS_BYTES, "Python and PyTorch"))
    process = PROCESS_BYTES if on_cpu else 0
    whole = process + size.weights + measuring.bytes
    split = ", before an engine splits them" if how.engine in SHARDED else ""
    stages = [
        Part("loading", process + _loading(size, how), f"whole weights{split}"),
        Part(
            "training" if trains else "editing",
            sum(part.bytes for part in parts),
            "the parts above",
        ),
        Part("measuring", whole, f"whole weights and {measuring.why}"),
    ]
    if prepared.recipe.evals.every:
        states = sum(part.bytes for part in parts if part.part in _KEPT)
        why = f"what training keeps, and {measuring.why}"
        stages.append(Part("measuring on the way", states + measuring.bytes, why))
    peak = max(stage.bytes for stage in stages)
    return Estimate(device, parts, stages, _host(size, how, peak if on_cpu else None))


def device_of(recipe: Recipe) -> str:
    """Name the kind of device planned for: CUDA when its memory is given, else what is here."""
    return "cuda" if recipe.launch.device_memory is not None else models.best_device()


def for_its_device(prepared: Prepared) -> Prepared:
    """Settle ``model.dtype: auto`` for the device planned for, which need not be here."""
    if prepared.source.dtype != "auto" or device_of(prepared.recipe) == models.best_device():
        return prepared
    model = prepared.recipe.model.model_copy(update={"dtype": "bfloat16"})
    recipe = prepared.recipe.model_copy(update={"model": model})
    return replace(prepared, recipe=recipe, source=replace(prepared.source, dtype="bfloat16"))


_KEPT = ("process", "weights", "fp32 copy", "optimizer", "reference", "buffers")
"""Parts of training that stay while a measurement is made on the way."""


def _loading(size: Footprint, how: Training) -> float:
    """Give the bytes of the whole weights and, where they are split, of the new parts."""
    parts = how.processes if how.engine in ("fsdp2", "zero3") else math.inf
    return size.weights * (1 + 1 / parts)


def _host(size: Footprint, how: Training, on_cpu: float | None) -> list[Part]:
    """List what the processes of one node take of its memory, by stage.

    ``on_cpu``: what each of them needs at its peak, where the host's memory is the device's too.
    """
    process = how.nproc * PROCESS_BYTES
    held_there = how.nproc * _offloaded(size, how)
    saving = size.weights + (size.trained if how.engine in SHARDED else 0)
    if on_cpu is not None:
        kept = how.nproc * on_cpu + held_there
        each = f"{how.nproc} processes share it" if how.nproc > 1 else "one process"
        extra = saving if how.engine in SHARDED else 0
        weights, trained = held(size, how)
        states = model_states(how, weights=weights, trained=trained, trainable=size.trainable)
        left = process + how.nproc * sum(states.values())
        return [
            Part("training", kept, each),
            Part("saving", left + extra, "whole weights, put together by the first process"),
        ]
    found = [
        Part("loading", process + how.nproc * size.weights, "each process reads whole weights"),
        Part("saving", process + held_there + saving, "the first process puts weights together"),
    ]
    if held_there:
        why = "weights, gradients and optimiser of ZeRO 3 offload"
        found.insert(1, Part("training", process + held_there, why))
    return found


def _offloaded(size: Footprint, how: Training) -> float:
    """Give what one process keeps in the host's memory; gradients in fp32 come on top."""
    if how.engine != "zero3-offload":
        return 0
    weights, trained = held(size, how)
    states = model_states(how, weights=weights, trained=trained, trainable=size.trainable)
    return sum(states.values()) + (4 * size.trainable / how.processes if how.half else 0)


def training_of(prepared: Prepared) -> Training:
    """Read off a recipe what decides memory in training."""
    recipe = prepared.recipe
    section, launch = recipe.training, recipe.launch
    bf16 = models.resolve_dtype(recipe.model.dtype) == torch.bfloat16
    return Training(
        engine=launch.chosen,
        processes=launch.processes,
        nproc=launch.nproc,
        accumulation=recipe.accumulation,
        optimizer=section.optim,
        checkpointing=section.gradient_checkpointing,
        half=bf16 or bool(section.extras.get("bf16")),
        cuda=device_of(recipe) == "cuda",
        reference=_reference(prepared),
    )


def _reference(prepared: Prepared) -> str:
    if needs_live(prepared):
        return "adapters" if prepared.recipe.model.lora else "copy"
    asked = any(term.objective.uses_reference for term in prepared.terms)
    return "cached" if asked else "none"


def largest_batch(prepared: Prepared, size: Footprint) -> Batch:
    """Give the longest rows that can meet in one forward pass, and what is read of them."""
    rows = prepared.recipe.training.per_device_train_batch_size
    rows = min(rows, len(prepared.streams[prepared.anchor].examples))
    chosen = {name: _longest(stream.examples, rows) for name, stream in prepared.trained.items()}
    reads = {read for term in prepared.terms for read in term.reads}
    hidden_only = {name for name, _ in reads} - {name for name, layer in reads if layer is None}
    scored = {name: stream for name, stream in chosen.items() if name not in hidden_only}
    reading = [(name, term.objective.reads) for term in prepared.terms for name in term.streams]
    whole = {name for name, what in reading if what in ("labelled", "logits")}
    passes: list[tuple[int, int | None]] = []
    apart = prepared.recipe.training.passes == "apart"
    groups = [[stream] for stream in scored.values()] if apart else [list(scored.values())]
    passes += [(_tokens(size, group), None) for group in groups if group]
    for layer in _read_layers(prepared):
        streams = [stream for name, stream in chosen.items() if (name, layer) in reads]
        passes.append((_tokens(size, streams), layer))
    count = sum(len(stream) for stream in chosen.values())
    return Batch(
        passes=tuple(passes),
        scored=tuple(
            sum(_labelled(row) for row in stream)
            for name, stream in scored.items()
            if name not in whole
        ),
        full=tuple(
            len(chosen[name]) * max(len(row.input_ids) for row in chosen[name])
            if (name, "logits") in reading
            else sum(_labelled(row) for row in chosen[name])
            for name in sorted(whole)
        ),
        longest=max(len(row.input_ids) for stream in chosen.values() for row in stream),
        text=f"{count} rows, at most {sum(tokens for tokens, _ in passes):,} tokens",
        apart=apart,
    )


def _longest(examples: Sequence[Example], rows: int) -> list[Example]:
    """Give the longest rows; a set that is too small is gone through again."""
    ordered = sorted(examples, key=lambda row: -len(row.input_ids))
    return [ordered[place % len(ordered)] for place in range(rows)]


def _labelled(row: Example) -> int:
    return sum(label != -100 for label in row.labels[1:])


def _tokens(size: Footprint, streams: list[list[Example]]) -> int:
    """Count tokens as they go through the model: without padding where rows are packed."""
    lengths = [len(row.input_ids) for stream in streams for row in stream]
    return sum(lengths) if size.packs else len(lengths) * max(lengths)


def _measuring(prepared: Prepared, model: Any, weights: float) -> Measuring:
    """Give the larger of one forward pass and the cache of the answers being written.

    ``weights`` are those of a whole model: a second one is held for the distance from the start.
    """
    evals, model = prepared.recipe.evals, plain(model)
    examples = [row for stream in prepared.streams.values() for row in stream.examples]
    longest = max(len(row.input_ids) for row in examples)
    tokens = min(evals.batch_tokens, CPU_TOKENS) if device_of(prepared.recipe) == "cpu" else None
    tokens = max(longest, tokens or evals.batch_tokens)
    found = [Measuring(scoring_bytes(model, tokens), f"a forward pass over {tokens:,} tokens")]
    if evals.generate:
        room = WRITING_TOKENS * evals.batch_tokens
        if evals.tofu is None:
            asked = sum(min(evals.max_rows, len(s.examples)) for s in prepared.given.values())
            room = min(room, asked * (longest + evals.max_new_tokens))
        why = f"keys and values of {room:,} tokens"
        found.append(Measuring(writing_bytes(model, room), why))
    if evals.retain_kl:
        why = "the starting model, and the logits of both"
        found.append(Measuring(weights + logit_bytes(model, evals.batch_tokens), why))
    return max(found, key=lambda one: one.bytes)
