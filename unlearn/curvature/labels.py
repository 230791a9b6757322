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

from unlearn.head import VocabularyHead, piece_size

Fisher = Literal["importance", "mc", "empirical"]
Ascend = Literal["nll", "unlikelihood"]
"""What is raised on the forget rows: −log p, or log(1 − p)."""
Logits = Float[Tensor, "position vocab"]
SIGNS = 2**32
"""Sets the streams of numbers apart that give signs."""


@dataclass(frozen=True)
class LabelSource:
    """Which labels the loss is taken at.

    ``mc``: drawn from the model p; the gradients' second moment is then the Fisher matrix, which is
    the curvature of the KL. Where p is all but certain, nearly every draw is its first choice, with
    hardly a gradient, and what matters comes from few draws. ``importance``: drawn from
    q ∝ p_y ‖p − e_y‖² instead, the gradient p − e_y times √(p_y / q_y) and a random sign. The
    second moment is the same (the sign takes away what positions would have in common), and every
    draw at a position is of the same length, √(1 − Σp²). Importance sampling is old; its use here
    is ours. ``empirical``: the labels of the rows; gradients add up to that of the rows' own loss.
    ``ascend`` says which, with the labels of the rows: −log p, or log(1 − p) (the unlikelihood of
    Welleck et al. 2020, arXiv:1908.04319), whose gradient is p/(1 − p) times that of −log p.
    ``stream`` sets the draws of different passes apart.
    """

    fisher: Fisher = "importance"
    draws: int = 1
    seed: int = 0
    stream: int = 0
    ascend: Ascend = "nll"

    @property
    def number(self) -> int:
        """Backward passes per batch."""
        return 1 if self.fisher == "empirical" else self.draws


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
    """Give the gradient of Σ −log p(label) at the head's input, once per draw of labels.

    With ``importance`` it is weighted, see :class:`LabelSource`.
    """
    size = piece_size(head, hidden)
    draws = _draws(source, places)
    parts: list[list[Tensor]] = [[] for _ in draws]
    for start in range(0, len(hidden), size):
        piece = slice(start, start + size)
        for part, found in zip(
            parts, _piece(head, hidden[piece], [one.at(piece) for one in draws]), strict=True
        ):
            part.append(found)
    return [torch.cat(part) if part else torch.zeros_like(hidden) for part in parts]


@dataclass(frozen=True)
class _Draw:
    """The true labels, or a number in (0, 1) per position that chooses one, and maybe a sign."""

    targets: Tensor | None = None
    ascend: Ascend = "nll"
    uniform: Tensor | None = None
    signs: Tensor | None = None

    def at(self, piece: slice) -> "_Draw":
        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[piece]

        return _Draw(cut(self.targets), self.ascend, cut(self.uniform), cut(self.signs))

    def cotangent(
        self,
        logits: Float[Tensor, "position vocab"],
        probabilities: Float[Tensor, "position vocab"],
    ) -> Float[Tensor, "position vocab"]:
        """Give the gradient at the logits."""
        if self.signs is not None:
            assert self.uniform is not None
            return _important(probabilities, self.uniform, self.signs.to(probabilities))
        labels = self.targets
        if self.uniform is not None:
            labels = sample(probabilities, self.uniform)
        assert labels is not None
        if self.ascend == "unlikelihood":
            return _unlikely(logits, probabilities, labels.to(probabilities.device))
        return _less_one(probabilities, labels.to(probabilities.device))


def _less_one(probabilities: Tensor, labels: Int[Tensor, " position"]) -> Tensor:
    """Give p − e_y."""
    there = labels[:, None]
    return probabilities.scatter_add(-1, there, -torch.ones_like(there, dtype=probabilities.dtype))


def _unlikely(logits: Tensor, probabilities: Tensor, labels: Int[Tensor, " position"]) -> Tensor:
    """Give p_y (r − e_y), where r is the distribution of all other tokens.

    It is p_y/(1 − p_y) (p − e_y), but exact where p_y rounds to 1.
    """
    there = labels[:, None]
    others = logits.scatter(-1, there, -torch.inf).softmax(-1)
    return probabilities.gather(-1, there) * _less_one(others, labels)


def _important(
    probabilities: Float[Tensor, "position vocab"],
    uniform: Float[Tensor, " position"],
    signs: Float[Tensor, " position"],
) -> Float[Tensor, "position vocab"]:
    """Draw y from q ∝ p_y ‖p − e_y‖² and give ±√(p_y / q_y) (p − e_y), of length √(1 − Σp²).

    Σ_y p_y ‖p − e_y‖² = 1 − Σp², so √(p_y / q_y) = √(1 − Σp²) / ‖p − e_y‖. With
    ‖p − e_y‖² = (1 − p_y)² + Σp² − p_y².
    """
    squares = probabilities.square()
    others = (squares.sum(-1, keepdim=True) - squares).clamp_min(0)
    lengths = (1 - probabilities).square() + others
    weights = probabilities * lengths
    gradient = _less_one(probabilities, sample(weights, uniform))
    total = weights.sum(-1, keepdim=True)
    norm = gradient.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient * (signs[:, None] * total.sqrt() / norm)


def _draws(source: LabelSource, places: Places) -> list[_Draw]:
    if source.fisher == "empirical":
        return [_Draw(places.targets, source.ascend)]

    def numbers(stream: int, draw: int) -> Tensor:
        return uniforms(source.seed, stream, draw, places.rows, places.positions)

    found = []
    for draw in range(source.draws):
        signs = None
        if source.fisher == "importance":
            signs = (numbers(SIGNS + source.stream, draw) < 0.5).double() * 2 - 1
        found.append(_Draw(uniform=numbers(source.stream, draw), signs=signs))
    return found


def _piece(head: VocabularyHead, hidden: Tensor, draws: Sequence[_Draw]) -> Iterator[Tensor]:
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = head.logits(leaf)
    probabilities = logits.detach().softmax(-1)
    for number, one in enumerate(draws):
        more = number + 1 < len(draws)
        ahead = one.cotangent(logits.detach(), probabilities)
        (found,) = torch.autograd.grad(logits, leaf, ahead, retain_graph=more)
        yield found


def toward(
    head: VocabularyHead, hidden: Float[Tensor, "label width"], then: Float[Tensor, "label width"]
) -> Float[Tensor, "label width"]:
    """Give the gradient of Σ KL(then || now) at the head's input; at the logits it is q − p."""
    found = []
    size = piece_size(head, hidden)
    for now, before in zip(hidden.split(size), then.to(hidden.device).split(size), strict=True):
        with torch.enable_grad():
            leaf = now.detach().requires_grad_()
            logits = head.logits(leaf)
        ahead = logits.detach().softmax(-1) - head.logits(before).softmax(-1)
        found += torch.autograd.grad(logits, leaf, ahead)
    return torch.cat(found) if found else torch.zeros_like(hidden)
