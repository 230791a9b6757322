"""Weighting rows by their losses while a model is trained: when, over which rows, how strongly.

Rows are weighted against others: those of one forward pass of all processes (``micro``), of the
whole optimiser step (``step``), of the steps before (``stream``), or of the last epoch
(``cached``). Every scope gives a factor per row whose mean is 1, by which the trainer multiplies
that row's loss; ``stream`` keeps the mean at 1 over time, not in each batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unlearn.posttrain.weights import (
    Strategy,
    factors,
    place_between,
    sample_weights,
    score,
)

Scope = Literal["micro", "step", "stream", "cached"]
WINDOW = 64
"""Rows that the scope ``stream`` remembers: few, since losses fall while a model is trained."""


@dataclass(frozen=True)
class Rows:
    """What is known of some rows: loss (nats per token), units (0: an empty row), place in the set.

    ``units`` is what the loss is averaged over: labelled tokens, or 1 for one value per row.
    """

    losses: Float[Tensor, " row"]
    units: Float[Tensor, " row"]
    index: Int[Tensor, " row"]

    @property
    def valid(self) -> Bool[Tensor, " row"]:
        """Mark rows that hold something."""
        return self.units > 0

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Put rows end to end."""
        return cls(
            torch.cat([part.losses for part in parts]),
            torch.cat([part.units for part in parts]),
            torch.cat([part.index for part in parts]),
        )


@dataclass(frozen=True)
class Weighting:
    """How rows are weighted; see :func:`~unlearn.posttrain.weights.sample_weights`.

    For the first ``warmup`` share of the steps all rows count alike: early losses do not tell rows
    apart yet. Over the next ``anneal`` share the logarithm of the largest ratio grows from 0.
    """

    strategy: Strategy = "linupper"
    max_weight_ratio: float = 10.0
    scope: Scope = "micro"
    warmup: float = 0.05
    anneal: float = 0.05
    trim: float = 0.0

    def ratio(self, progress: float) -> float:
        """Give the largest ratio of two weights once this share of the steps is done."""
        if self.strategy == "uniform" or progress < self.warmup:
            return 1.0
        gone = (progress - self.warmup) / self.anneal if self.anneal else 1.0
        return math.exp(math.log(self.max_weight_ratio) * min(1.0, gone))

    def factors(self, rows: Rows, ratio: float) -> Float[Tensor, " row"]:
        """Weight rows against each other."""
        weights = sample_weights(
            rows.losses,
            rows.valid,
            strategy=self.strategy,
            max_weight_ratio=ratio,
            trim=self.trim,
        )
        return factors(weights, rows.units)


@dataclass
class Stream:
    """Weights against the rows of the steps before: the last :data:`WINDOW` of all processes.

    A row's weight is a function of its own loss, where the window says where the ends are and what
    weights are on average. So no batch is too small, and passes need not wait for each other. The
    window travels in the checkpoints.
    """

    how: Weighting
    losses: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)

    def factors(self, rows: Rows, ratio: float) -> Float[Tensor, " row"]:
        if not self.losses or ratio == 1.0:
            return rows.valid.to(rows.losses.dtype)
        losses, units = rows.losses.new_tensor([self.losses, self.units])
        ends = losses.quantile(losses.new_tensor([self.how.trim, 1.0 - self.how.trim]))

        def raw(of: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
            places = place_between(of, ends[0], ends[1])
            return ((score(places, self.how.strategy) - 1.0) * math.log(ratio)).exp()

        mean = (raw(losses) * units).sum() / units.sum()
        return (raw(rows.losses) / mean).clamp_max(ratio) * rows.valid

    def after_step(self, rows: Rows, ratio: float) -> None:
        """Take in the rows of a step."""
        self.losses = (self.losses + rows.losses[rows.valid].tolist())[-WINDOW:]
        self.units = (self.units + rows.units[rows.valid].tolist())[-WINDOW:]

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "units": self.units}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses, self.units = list(state["losses"]), list(state["units"])


@dataclass
class Cached:
    """Weights by the losses of the last epoch, against all rows of the set; no further pass.

    ``units`` are those of every row of the set. In the first epoch all rows count alike. Losses of
    this epoch and of the last one travel in the checkpoints.
    """

    how: Weighting
    units: Float[Tensor, " row"]
    known: Float[Tensor, " row"] = field(init=False)
    fresh: Float[Tensor, " row"] = field(init=False)

    def __post_init__(self) -> None:
        self.known = torch.full_like(self.units, torch.nan)
        self.fresh = self.known.clone()

    def factors(self, rows: Rows, ratio: float) -> Float[Tensor, " row"]:
        whole = Rows(self.known, self.units * self.known.isfinite(), torch.arange(len(self.known)))
        if ratio == 1.0 or not bool(whole.valid.any()):
            return rows.valid.to(rows.losses.dtype)
        found = torch.where(
            whole.valid, self.how.factors(whole, ratio), torch.ones_like(self.known)
        )
        mine = found[rows.index.cpu().clamp_min(0)].to(rows.losses)
        return mine * rows.valid

    def after_step(self, rows: Rows, ratio: float) -> None:
        """Take in the rows of a step."""
        valid = rows.valid
        self.fresh[rows.index[valid].cpu()] = rows.losses[valid].to(self.fresh)

    def after_epoch(self) -> None:
        """Weight by what this epoch has found; a row that it left out keeps its loss."""
        self.known = torch.where(self.fresh.isfinite(), self.fresh, self.known)
        self.fresh = torch.full_like(self.fresh, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        return {"known": _plain(self.known), "fresh": _plain(self.fresh)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("known", "fresh"):
            values = [math.nan if value is None else value for value in state[name]]
            setattr(self, name, torch.tensor(values, dtype=self.units.dtype))


def _plain(losses: Float[Tensor, " row"]) -> list[float | None]:
    """Give losses as JSON knows them: null where none is known."""
    return [value if math.isfinite(value) else None for value in losses.tolist()]
