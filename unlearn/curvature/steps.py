"""How long a step is, and the weights it is added to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearn.curvature.direction import Direction
from unlearn.curvature.factors import accumulated
from unlearn.curvature.layers import Tracked

EVALUATIONS = 8
"""Most measurements that one search makes."""
CLOSE = 0.05
"""A search ends within this share of the rise it aims at, or of the KL it may use."""
STRETCH = 4.0
"""Factor between trials until the scale is bracketed."""


@dataclass(frozen=True)
class Reading:
    """Forget loss and KL on held-out retain rows, in nats per token."""

    nll: float
    kl: float


@dataclass(frozen=True)
class Goal:
    """What a search aims at: a forget loss (None: no matter which), and a KL not to be exceeded.

    ``rise`` is how far the loss is to go from here.
    """

    nll: float | None
    kl: float
    rise: float = 0.0

    def too_far(self, found: Reading) -> bool:
        """Tell whether a shorter step is wanted; what is not finite is too far."""
        within = found.kl <= self.kl and (
            self.nll is None or found.nll <= self.nll + CLOSE * self.rise
        )
        return not (within and math.isfinite(found.nll))

    def reached(self, found: Reading) -> bool:
        """Tell whether a step that is not too far is long enough."""
        there = self.nll is not None and found.nll >= self.nll - CLOSE * self.rise
        return there or found.kl >= (1 - CLOSE) * self.kl


@dataclass(frozen=True)
class Found:
    """The scale a search settled on, what was measured there, and how often it measured."""

    alpha: float
    reading: Reading
    evaluations: int


def search(
    measure: Callable[[float], Reading],
    now: Reading,
    start: float,
    goal: Goal,
    *,
    trials: int = EVALUATIONS,
    longest: float = math.inf,
) -> Found | None:
    """Find the scale α of a step by bisection on log α, from measurements alone.

    What is given is the longest step tried that is not too far, or None when all were; none is
    longer than ``longest``. A longer step after which the loss is lower than ``now``, or than after
    a shorter one, is past the top and too far as well. The quadratic model only gives ``start``:
    where the forget set was memorised it is far off.
    """
    low, high, alpha, number = 0.0, math.inf, start, 0
    best: Reading | None = None
    while number < trials:
        found, number = measure(alpha), number + 1
        worse = found.nll <= now.nll or (best is not None and found.nll < best.nll)
        if worse or goal.too_far(found):
            high = alpha
        else:
            low, best = alpha, found
            if goal.reached(found) or low == longest:
                break
        alpha = min(_next(low, high), longest)
    return None if best is None else Found(low, best, number)


def _next(low: float, high: float) -> float:
    if high == math.inf:
        return low * STRETCH
    return high / STRETCH if low == 0 else math.sqrt(low * high)


class Weights:
    """Tracked weights as they were, and what has been added to them since.

    They are always written as start + sum of steps, added in fp32 and rounded once: rounding never
    accumulates, and a trial leaves no trace.
    """

    def __init__(self, layers: Sequence[Tracked]) -> None:
        self.layers = layers
        self.start = {layer.name: layer.weight.detach().clone() for layer in layers}
        self.total: dict[str, Tensor] = {
            name: torch.zeros_like(one, dtype=accumulated(one.dtype))
            for name, one in self.start.items()
        }

    @torch.no_grad()
    def put(self, step: Direction | None = None, alpha: float = 0.0) -> None:
        """Write the weights, with a trial step on top where one is given."""
        for layer in self.layers:
            start, total = self.start[layer.name], self.total[layer.name]
            moved = start.to(total) + total
            if step is not None:
                moved += alpha * step.weights[layer.name]
            layer.weight.copy_(moved)

    def changes(self) -> dict[str, Tensor]:
        """Give what has been added so far, by name of the weight and laid out as it is."""
        return {
            f"{layer.name}.weight": layer.laid_out(self.total[layer.name]) for layer in self.layers
        }

    def take(self, step: Direction, alpha: float) -> None:
        """Add a step for good."""
        for name, total in self.total.items():
            total += alpha * step.weights[name]
        self.put()
