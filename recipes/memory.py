"""Memory of one process, by part and by stage, as formulas over sizes: nothing here is measured.

Model states follow Rajbhandari et al. 2020 (arXiv:1910.02054, figure 1) with the engines' own
sources read for what they keep beside them (torch 2.13, DeepSpeed 0.19):

* DDP copies gradients into buckets: as many bytes again (``gradient_as_bucket_view`` is off).
* FSDP2 gathers one layer while it computes with another, and keeps the head gathered from its
  forward to its backward pass. Between micro-batches it keeps gradients whole, unless it reduces
  them in each.
* DeepSpeed updates a copy of the trained weights in fp32, with optimiser states in fp32; it keeps
  that copy even where the weights are in fp32 themselves. Gradients are reduced through buckets of
  fixed size; ZeRO 3 keeps up to ``stage3_max_live_parameters`` gathered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unlearn.engines import SHARDED, Engine, engine_arguments
from unlearn.head import CHUNK_BYTES
from unlearn.recipes.footprint import Footprint

GIB = 2**30
PROCESS_BYTES = 0.6 * GIB
"""Python with PyTorch, transformers and this package, before any model (measured on Linux)."""
OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "adamw": 2, "lion": 1, "rmsprop": 1}
"""Values an optimiser keeps per trained parameter, by the beginning of its name."""
IN_FLIGHT = 0.25
"""Gradients passed on within a layer's backward pass, as a share of what its forward pass keeps:
counted on Llamas, 0.15 to 0.3."""
BUCKET, LIVE, PREFETCHED, SUB_GROUP = 5e8, 1e9, 5e7, 1e9
"""DeepSpeed's defaults, in parameters."""


@dataclass(frozen=True)
class Part:
    """What holds memory, how many bytes of it on one device, and why."""

    part: str
    bytes: float
    why: str


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch of one process.

    ``passes`` are its forward passes with gradient: tokens, and the layer where they end (None:
    none before the head). ``scored`` are the labelled tokens of each stream, ``full`` the positions
    of each stream whose whole distributions are kept. ``apart``: each pass goes back before the
    next begins.
    """

    passes: tuple[tuple[int, int | None], ...]
    scored: tuple[int, ...]
    full: tuple[int, ...]
    longest: int
    text: str = ""
    apart: bool = False


@dataclass(frozen=True)
class Training:
    """How it is trained: what of a recipe decides memory beside model and data.

    ``half``: in bfloat16. ``reference``: the frozen start is ``none``, ``cached`` on disk,
    ``adapters`` switched off, or a ``copy``.
    """

    engine: Engine = "none"
    processes: int = 1
    nproc: int = 1
    accumulation: int = 1
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    half: bool = False
    cuda: bool = False
    reference: str = "none"

    @property
    def states(self) -> int:
        """Optimiser states per trained parameter."""
        return next((n for k, n in OPTIMIZER_STATES.items() if self.optimizer.startswith(k)), 2)

    @property
    def zero(self) -> Mapping[str, Any]:
        """DeepSpeed's own settings of this engine."""
        if not self.engine.startswith("zero"):
            return {}
        found = engine_arguments(self.engine, bf16=self.half)["deepspeed"]["zero_optimization"]
        return dict(found)

    @property
    def sync_each(self) -> bool:
        """Whether gradients are reduced in every micro-batch."""
        if self.engine.startswith("zero"):
            return True
        settings = engine_arguments(self.engine, bf16=self.half).get("accelerator_config") or {}
        kept = settings.get("gradient_accumulation_kwargs") or {}
        return self.accumulation == 1 or bool(kept.get("sync_each_batch"))


def model_states(
    how: Training, *, weights: float, trained: float, trainable: float
) -> dict[str, float]:
    """Give the bytes of weights, gradients, fp32 copy and optimiser states of one process.

    ``weights`` and ``trained`` are the bytes of all weights and of those that are trained,
    ``trainable`` is the number of the latter. With ZeRO 3 offload they lie in the host's memory.
    """
    zero = how.engine.startswith("zero")
    parts = how.processes if zero or how.engine in SHARDED else 1
    whole = how.engine == "fsdp2" and not how.sync_each
    width = 1 if "8bit" in how.optimizer else 4 if zero else trained / max(1, trainable)
    return {
        "weights": weights / (how.processes if how.engine in SHARDED else 1),
        "gradients": trained / (1 if whole else parts),
        "fp32 copy": 4 * trainable / parts if zero else 0,
        "optimizer": how.states * width * trainable / parts,
    }


def held(size: Footprint, how: Training) -> tuple[float, float]:
    """Give the bytes of all weights and of the trained ones as the engine holds them.

    DeepSpeed casts everything to bfloat16, adapters too.
    """
    if how.engine.startswith("zero") and how.half:
        frozen = min(size.weights - size.trained, 2.0 * (size.parameters - size.trainable))
        return frozen + 2 * size.trainable, 2 * size.trainable
    return size.weights, size.trained


def training_parts(size: Footprint, batch: Batch, how: Training) -> list[Part]:
    """List what one device holds when it holds most in training; the parts add up to that."""
    weights, trained = held(size, how)
    states = model_states(how, weights=weights, trained=trained, trainable=size.trainable)
    if how.engine == "zero3-offload":
        states = dict.fromkeys(states, 0.0)
    kept, working = activations(size, batch, how.checkpointing)
    logits, update = head_bytes(size, batch), update_bytes(size, trained, how)
    passing = states | {
        "activations": kept + max(0.0, working - logits),
        "head": logits,
        "reference": _reference(size, how),
        "buffers": communication_buffers(size, how),
        "update": update,
    }
    backward, gradients = kept + max(logits, working), states["gradients"]
    # gradients come as activations go, unless earlier micro-batches left theirs
    before = 0 if how.accumulation == 1 and not how.engine.startswith("zero") else gradients
    peak = max(backward + before, gradients + max(update, working))
    passing["overlap"] = peak - (backward + gradients + update)
    why = _why(size, batch, how)
    return [
        Part(name, number, why[name])
        for name, number in passing.items()
        if name in ALWAYS or round(number)
    ]


ALWAYS = ("weights", "gradients", "optimizer", "activations", "head", "reference")
"""Parts that are listed even where they are nothing."""
REFERENCES = {
    "none": "no term needs one",
    "cached": "cached on disk, no second model",
    "adapters": "adapters switched off",
    "copy": "a frozen copy of what is trained",
}
BUFFERS = {
    "ddp": "gradients in DDP's buckets",
    "fsdp2": "gathered: embeddings, head, two layers",
    "zero2": "buckets of gradients",
    "zero3": "gathered weights, buckets of gradients",
}


def _why(size: Footprint, batch: Batch, how: Training) -> dict[str, str]:
    """Say of every part where it comes from."""
    split = f", split by {how.processes}" if how.processes > 1 else ""
    split = ", on the host" if how.engine == "zero3-offload" else split
    weights = split if how.engine in SHARDED else ""
    states = split if how.engine in (*SHARDED, "zero2") else ""
    gradients = states if how.engine != "fsdp2" or how.sync_each else ", whole between passes"
    return {
        "weights": f"{size.parameters:,} parameters{weights}",
        "gradients": f"{size.trainable:,} trained{gradients}",
        "fp32 copy": f"what DeepSpeed updates{states}",
        "optimizer": f"{how.optimizer}: {how.states} per parameter{states}",
        "activations": batch.text + (", checkpointed" if how.checkpointing else ""),
        "head": "whole distributions: a term reads them" if batch.full else "logits in chunks",
        "reference": REFERENCES[how.reference],
        "buffers": BUFFERS.get(how.engine, BUFFERS["zero3"]),
        "update": "while the optimiser steps",
        "overlap": "gradients, activations, update: not at one time",
    }


def _reference(size: Footprint, how: Training) -> float:
    """Give the bytes of a frozen copy; where the weights are to be split, frozen ones are too."""
    if how.reference != "copy":
        return 0
    return size.weights if how.engine in SHARDED else size.trained


def activations(size: Footprint, batch: Batch, checkpointing: bool) -> tuple[float, float]:
    """Give what is kept for the backward pass, and what a layer's backward pass adds while it runs.

    With gradient checkpointing a layer's activations are computed again, one layer at a time.
    """
    more = (size.packed if size.packs else 0) + size.matrix * batch.longest

    def depth(last: int | None) -> int:
        return size.layers if last is None else last + 1

    whole = [tokens * (size.kept[last] + more * depth(last)) for tokens, last in batch.passes]
    passes = zip(whole, batch.passes, strict=True)
    layer = max((kept / depth(last) for kept, (_, last) in passes), default=0.0)
    held = max if batch.apart else sum
    if not checkpointing:
        return held(whole), layer * IN_FLIGHT
    kept = held(tokens * size.checkpointed[last] for tokens, last in batch.passes)
    return kept, layer * (1 + IN_FLIGHT)


def head_bytes(size: Footprint, batch: Batch) -> float:
    """Give what the vocabulary head takes at most, in its forward and backward pass.

    Labelled positions are read in chunks of at most ``CHUNK_BYTES`` fp32 logits. A stream that fits
    in one chunk keeps its log-probabilities; the others are computed again. The backward pass of a
    chunk needs two more of its size, or one and a half and the head's gradient, which is added up
    from several. A term that reads whole distributions has eight tensors of full logits at once:
    logits and log-probabilities of model and reference, and what is made of them.
    """
    sizes = [4.0 * count * size.vocabulary for count in batch.scored]
    once = [logits for logits in sizes if logits <= CHUNK_BYTES]
    again = [float(CHUNK_BYTES) for logits in sizes if logits > CHUNK_BYTES]
    chunk = max([*once, *again], default=0.0)
    reading = max(2 * chunk + max(again, default=0.0), 1.5 * chunk + 2 * size.head)
    if not sizes:
        reading = 0
    full = [4.0 * count * size.vocabulary for count in batch.full]
    whole = 6 * sum(full) + 2 * max(full, default=0.0)
    kept = max(once, default=0.0) if batch.apart else sum(once)
    return kept + max(reading, whole)


def communication_buffers(size: Footprint, how: Training) -> float:
    """Give what a device holds to talk to the others; see :data:`BUFFERS`."""
    weights, trained = held(size, how)
    if how.engine == "none":
        return 0
    if how.engine == "ddp":
        return trained
    if how.engine == "fsdp2":
        share = trained / weights
        return size.ends + 3 * size.layer + share * (size.ends + 2 * size.layer)
    width = 2.0 if how.half else 4.0
    wanted = float(how.zero.get("reduce_bucket_size", BUCKET))
    bucket = width * (wanted if how.cuda else min(wanted, size.trainable))
    sent = width * min(wanted, size.trainable)
    if how.engine == "zero2":
        return (2 if how.cuda else 1) * bucket + sent  # two take turns: ``overlap_comm``
    live = float(how.zero.get("stage3_max_live_parameters", LIVE))
    live += float(how.zero.get("stage3_prefetch_bucket_size", PREFETCHED))
    return min(weights, max(width * live, 2.0 * size.layer)) + bucket + sent


def update_bytes(size: Footprint, trained: float, how: Training) -> float:
    """Give what the optimiser's step takes on the device beside its states.

    On CUDA torch's AdamW works on all tensors at once and needs as many bytes as one of its states;
    not for FSDP2's tensors, nor on a CPU. DeepSpeed first makes its gradients fp32.
    """
    if how.engine in ("fsdp2", "zero3-offload"):
        return 0
    at_once = 1 if how.cuda and how.optimizer == "adamw_torch" else 0
    if not how.engine.startswith("zero"):
        return at_once * trained
    values = size.trainable if how.engine == "zero2" else min(size.trainable, SUB_GROUP)
    return 4 * values / how.processes * (at_once + (1 if how.half else 0))
