"""How long a step is, and the weights it is added to."""

import math
from collections.abc import Callable, Mapping, Sequence
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
STRETCH, SHRINK, LEAST = 4.0, 16.0, 0.1
"""Largest factors, up and down, until the scale is bracketed, and the log of the smallest."""
EDGE = 0.1
"""How near, in shares of the way, a trial between two others comes to one of them."""


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

    def excess(self, found: Reading) -> float:
        """Give the log of how many times as far as wanted a step went, by loss or by KL.

        0 is right; infinite where there is no such number.
        """
        shares = [found.kl / ((1 - CLOSE / 2) * self.kl)]
        if self.nll is not None:
            shares.append(1 + (found.nll - self.nll) / self.rise)
        share = max(shares)
        if share <= 0:
            return -math.inf
        return math.log(share) if math.isfinite(share) else math.inf


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
    """Find the scale α of a step on log α, from measurements alone.

    Between a step that was too short and one that was too long, log excess is taken to be linear in
    log α; where it is not known, the middle is tried. What is given is the longest step tried that
    is not too far, or None when all were; none is longer than ``longest``. A longer step after
    which the loss is lower than ``now``, or than after a shorter one, is past the top and too far
    as well. The quadratic model only gives ``start``: where the forget set was memorised it is far
    off.
    """
    short: _Trial | None = None
    long: _Trial | None = None
    best: Reading | None = None
    alpha, number = start, 0
    while number < trials:
        found, number = measure(alpha), number + 1
        past = found.nll <= now.nll or (best is not None and found.nll < best.nll)
        if past or goal.too_far(found):
            long = _Trial(alpha, math.inf if past else goal.excess(found))
        else:
            short, best = _Trial(alpha, goal.excess(found)), found
            if goal.reached(found) or alpha == longest:
                break
        alpha = min(math.exp(_next(short, long)), longest)
    return None if best is None or short is None else Found(short.alpha, best, number)


@dataclass(frozen=True)
class _Trial:
    """The scale of a step, and its log excess."""

    alpha: float
    excess: float

    @property
    def at(self) -> float:
        return math.log(self.alpha)


def _next(short: _Trial | None, long: _Trial | None) -> float:
    """Give log α of the next trial; beyond what was tried, loss and KL grow at least with α."""
    if long is None:
        assert short is not None
        return short.at + min(max(-short.excess, LEAST), math.log(STRETCH))
    if short is None:
        return long.at - min(max(long.excess, LEAST), math.log(SHRINK))
    share = 0.5
    if math.isfinite(short.excess) and math.isfinite(long.excess):
        span = long.excess - short.excess
        share = min(max(-short.excess / span, EDGE), 1 - EDGE) if span > 0 else 0.5
    return short.at + share * (long.at - short.at)


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
            if step is not None:  # as take() will: what is measured is what is kept
                total = total + alpha * step.weights[layer.name]
            layer.weight.copy_(start.to(total) + total)

    def changes(self) -> dict[str, Tensor]:
        """Give what has been added so far, by name of the weight and laid out as it is."""
        return {
            f"{layer.name}.weight": layer.laid_out(self.total[layer.name]) for layer in self.layers
        }

    def restore(self, totals: Mapping[str, Tensor]) -> None:
        """Go to where an earlier edit had come to; ``totals`` are what it had added."""
        for name, total in self.total.items():
            total.copy_(totals[name])
        self.put()

    def take(self, step: Direction, alpha: float) -> None:
        """Add a step for good."""
        for name, total in self.total.items():
            total += alpha * step.weights[name]
        self.put()
