"""Labels of the Fisher matrix, and the gradient they give at the input of the vocabulary head.

Backward passes start below the head: a few positions at a time have their logits computed, labels
drawn, and softmax minus one-hot taken back through the head. ``[batch, seq, vocab]`` is never
allocated, and one forward pass serves several draws.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unlearn.head import CHUNK_BYTES, CPU_PIECE_BYTES, VocabularyHead

Fisher = Literal["mc", "empirical"]


@dataclass(frozen=True)
class LabelSource:
    """Which labels the loss is taken at.

    ``mc``: drawn from the model (the Fisher matrix, which is the curvature of the KL).
    ``empirical``: those of the rows; with them, gradients add up to that of the rows' own loss.
    ``stream`` sets the draws of different passes apart.
    """

    fisher: Fisher = "mc"
    draws: int = 1
    seed: int = 0
    stream: int = 0

    @property
    def number(self) -> int:
        """Backward passes per batch."""
        return self.draws if self.fisher == "mc" else 1


def uniforms(
    seed: int, stream: int, draw: int, rows: Int[Tensor, " label"], positions: Int[Tensor, " label"]
) -> Float[Tensor, " label"]:
    """Give a uniform number in (0, 1) per position: a pure function of all arguments.

    So labels do not depend on how rows are batched, padded or shared between processes. (SplitMix64
    of a counter: Steele et al. 2014, doi:10.1145/2660193.2660195.)
    """
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) + _GOLDEN * np.uint64(1 + stream))
        key = _mix(key + _GOLDEN * np.uint64(1 + draw))
        counter = _mix(key + _GOLDEN * rows.cpu().numpy().astype(np.uint64))
        counter = _mix(counter + _GOLDEN * (1 + positions.cpu().numpy().astype(np.uint64)))
    return torch.from_numpy(((counter >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def sample(
    probabilities: Float[Tensor, "position vocab"], at: Float[Tensor, " position"]
) -> Int[Tensor, " position"]:
    """Draw a token per position by inverting its cumulative distribution at a number in (0, 1).

    One number per position, where the maximum of Gumbel noise would need one per token: that is
    what lets labels be a function of their place.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not go past the end
    threshold = torch.minimum(at.to(cumulative)[:, None] * total, below)
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return drawn.clamp_max(probabilities.shape[-1] - 1)  # NaN is past the end; it is told later


@dataclass(frozen=True)
class Places:
    """Where the labelled positions of a batch are, and their true labels."""

    rows: Int[Tensor, " label"]
    positions: Int[Tensor, " label"]
    targets: Int[Tensor, " label"]


def cotangents(
    head: VocabularyHead,
    hidden: Float[Tensor, "label width"],
    places: Places,
    source: LabelSource,
) -> list[Float[Tensor, "label width"]]:
    """Give the gradient of Σ −log p(label) at the head's input, once per draw of labels."""
    size = piece_size(head, hidden)
    chosen = _given(source, places)
    parts: list[list[Tensor]] = [[] for _ in chosen]
    for start in range(0, len(hidden), size):
        piece = slice(start, start + size)
        given = [(part[0][piece], part[1]) for part in chosen]
        for draw, found in enumerate(_piece(head, hidden[piece], given)):
            parts[draw].append(found)
    return [torch.cat(part) if part else torch.zeros_like(hidden) for part in parts]


def _given(source: LabelSource, places: Places) -> list[tuple[Tensor, bool]]:
    """Give per draw the labels, or (True) the numbers that choose them."""
    if source.fisher == "empirical":
        return [(places.targets, False)]
    keys = (places.rows, places.positions)
    return [
        (uniforms(source.seed, source.stream, draw, *keys), True) for draw in range(source.draws)
    ]


def _piece(
    head: VocabularyHead, hidden: Tensor, given: Sequence[tuple[Tensor, bool]]
) -> Iterator[Tensor]:
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = head.logits(leaf)
    probabilities = logits.detach().softmax(-1)
    for number, (values, is_uniform) in enumerate(given):
        labels = sample(probabilities, values) if is_uniform else values.to(logits.device)
        more = number + 1 < len(given)
        error = probabilities.clone() if more else probabilities
        error[torch.arange(len(labels), device=labels.device), labels] -= 1
        (found,) = torch.autograd.grad(logits, leaf, error, retain_graph=more)
        yield found


def piece_size(head: VocabularyHead, hidden: Tensor) -> int:
    """Say how many positions have their logits computed at once."""
    room = CPU_PIECE_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES
    return max(1, room // (4 * head.vocabulary))
