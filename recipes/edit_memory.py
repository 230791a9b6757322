"""The memory of an edit that trains nothing: weights, their curvature, and passes over rows."""

from typing import Any

from unlearn.curvature.factors import accumulated
from unlearn.curvature.layers import named_layers
from unlearn.edits import EDITS
from unlearn.head import CHUNK_BYTES, CPU_PIECE_BYTES
from unlearn.recipes.footprint import Footprint
from unlearn.recipes.memory import Part
from unlearn.recipes.prepare import Prepared
from unlearn.scoring import CPU_TOKENS

SOLVING = 3
"""Copies of the factors of one layer while they are inverted: damped, factorised, working space."""


def edit_settings(prepared: Prepared) -> dict[str, Any]:
    """Give the hyperparameters of a recipe's edit, defaults filled in."""
    section = prepared.recipe.edit
    assert section is not None
    return EDITS[section.name].hyper | section.hyper


def edit_parts(prepared: Prepared, model: Any, size: Footprint, device: str) -> list[Part]:
    """List what one device holds while an edit is made; input factors count once per layer.

    (Layers that read the same input share theirs, so this is an upper bound.)
    """
    how = edit_settings(prepared)
    found = [Part("weights", size.weights, f"{size.parameters:,} parameters")]
    if "curvature" not in how:
        return found
    layers = named_layers(model, how["layers"])
    shapes = [sorted(map(int, module.weight.shape)) for module in layers.values()]
    width = accumulated(next(iter(layers.values())).weight.dtype).itemsize
    tracked = width * sum(small * large for small, large in shapes)
    limit = int(how["max_factor_dim"])
    squares = [_square(small, limit) + _square(large, limit) for small, large in shapes]
    tokens = min(how["batch_tokens"], CPU_TOKENS) if device == "cpu" else how["batch_tokens"]
    piece = CPU_PIECE_BYTES if device == "cpu" else CHUNK_BYTES
    recomputed = prepared.recipe.training.gradient_checkpointing
    kept = (size.checkpointed if recomputed else size.kept)[None]
    factors, spectrum = width * sum(squares), tracked * (how["curvature"] in ("ekfac", "diag"))
    if how["curvature"] == "diag":
        factors = 0
    return [
        *found,
        Part("start and steps", 2 * tracked, "what is added to, and what has been added"),
        Part("gradient", 2 * tracked, "of the forget loss, and the step it becomes"),
        Part("curvature", factors + spectrum, f"of {len(layers)} layers, {how['curvature']}"),
        Part("solving", SOLVING * width * max(squares), "the layer with the largest factors"),
        Part("activations", kept * tokens, f"{tokens:,} tokens"),
        Part("head", 4 * piece, "logits in chunks"),
    ]


def _square(side: int, limit: int) -> int:
    """Give the entries of a factor; one that is too wide is cut into blocks."""
    return side * side if side <= limit else side * limit
