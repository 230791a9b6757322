"""The memory of an edit that trains nothing: weights, their curvature, and passes over rows."""

from pathlib import Path
from typing import Any

from torch import nn

from unlearn.curvature import passes
from unlearn.curvature.factors import accumulated
from unlearn.curvature.layers import named_layers
from unlearn.curvature.parts import num_labels
from unlearn.curvature.steps import EVALUATIONS
from unlearn.edits import EDITS
from unlearn.edits.update import update_shapes
from unlearn.evals.memory import scoring_bytes
from unlearn.head import CHUNK_BYTES, CPU_PIECE_BYTES
from unlearn.recipes.clamp_plan import clamp_parts
from unlearn.recipes.footprint import Footprint
from unlearn.recipes.inputs import dictionaries_of, update_of
from unlearn.recipes.memory import Part
from unlearn.recipes.prepare import Prepared
from unlearn.scoring import CPU_TOKENS

SOLVING = 3
"""Copies of the factors of one layer while they are inverted: damped, factorised, working space."""


def edit_settings(prepared: Prepared) -> dict[str, Any]:
    """Give the hyperparameters of a recipe's edit, defaults filled in."""
    section = prepared.recipe.edit
    assert section is not None
    return EDITS[section.name].filled(section.hyper)


def edit_parts(prepared: Prepared, model: Any, size: Footprint, device: str) -> list[Part]:
    """List what one device holds while an edit is made; input factors count once per layer.

    (Layers that read the same input share theirs, so this is an upper bound.) Of adapters A and B
    are layers by themselves: small, but for A's input factor and B's output factor.
    """
    how = edit_settings(prepared)
    found = [Part("weights", size.weights, f"{size.parameters:,} parameters")]
    if place := update_of(prepared.recipe):
        return found + _reapplied_parts(prepared, model, Path(place), device)
    if dictionaries_of(prepared.recipe):
        return found + clamp_parts(prepared, model, device)
    if "curvature" not in how:
        return found
    layers = named_layers(model, how["layers"])
    shapes = [sorted(map(int, module.weight.shape)) for module in layers.values()]
    width = accumulated(next(iter(layers.values())).weight.dtype).itemsize
    tracked = width * sum(small * large for small, large in shapes)
    limit = int(how["max_factor_dim"])
    both = [_square(small, limit) + _square(large, limit) for small, large in shapes]
    squares = (
        both if how["curvature"] != "act" else [_inputs(one, limit) for one in layers.values()]
    )
    on_cpu = device == "cpu"
    tokens = min(how["batch_tokens"], passes.CPU_TOKENS) if on_cpu else how["batch_tokens"]
    piece = CPU_PIECE_BYTES if on_cpu else CHUNK_BYTES
    recomputed = prepared.recipe.training.gradient_checkpointing
    kept = (size.checkpointed if recomputed else size.kept)[None]
    factors, spectrum = width * sum(squares), tracked * (how["curvature"] in ("ekfac", "diag"))
    if how["curvature"] == "diag":
        factors = 0
    what = "adapter matrices" if prepared.recipe.model.lora else "layers"
    if how["correct"] and on_cpu:  # a GPU leaves them to the host
        states = _retain_labels(prepared, how["retain_tokens"])
        held = states * model.config.get_text_config().hidden_size * width
        found.append(Part("start outputs", held, f"at {states:,} retain tokens, to come back to"))
    return [
        *found,
        Part("start and steps", 2 * tracked, "what is added to, and what has been added"),
        Part("gradient", 2 * tracked, "of the forget loss, and the step it becomes"),
        Part("curvature", factors + spectrum, f"of {len(layers)} {what}, {how['curvature']}"),
        Part("solving", SOLVING * width * max(squares), "the layer with the largest factors"),
        Part("activations", kept * tokens, f"{tokens:,} tokens"),
        Part("head", 4 * piece, "logits in chunks"),
    ]


def _reapplied_parts(prepared: Prepared, model: Any, place: Path, device: str) -> list[Part]:
    """List what is held while scales of an update are tried: nothing is kept for backward passes.

    The update stays in the host's memory, which on a CPU is the device's; a GPU gets one weight of
    it at a time.
    """
    own = dict(model.named_parameters())
    weights = [own[name] for name in update_shapes(place)]
    longest = max(len(row.input_ids) for one in prepared.streams.values() for row in one.examples)
    tokens = edit_settings(prepared)["batch_tokens"]
    tokens = max(longest, min(tokens, CPU_TOKENS) if device == "cpu" else tokens)
    wide = [one.numel() * accumulated(one.dtype).itemsize for one in weights]
    found = [
        Part("start", sum(one.nbytes for one in weights), "what every trial is added to"),
        Part("one weight", 3 * max(wide), "of the update, scaled and added, in fp32"),
        Part("forward pass", scoring_bytes(model, tokens), f"over {tokens:,} tokens"),
    ]
    if device == "cpu":
        found.insert(1, Part("update", place.stat().st_size, "as the file has it"))
    return found


def readings(prepared: Prepared) -> int:
    """Count how often rows are read at most while scales are tried, the start included."""
    return 1 + (EVALUATIONS if edit_settings(prepared)["scale"] == "search" else 1)


def _retain_labels(prepared: Prepared, cap: int | None) -> int:
    """Count the retain tokens that curvature is fitted to, held-out rows with them."""
    labels = num_labels(prepared.streams["retain"].examples)
    return labels if cap is None else min(labels, cap)


def _inputs(module: Any, limit: int) -> int:
    """Give the entries of a layer's input factor."""
    inputs = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
    return _square(int(inputs), limit)


def _square(side: int, limit: int) -> int:
    """Give the entries of a factor; one that is too wide is cut into blocks."""
    return side * side if side <= limit else side * limit
