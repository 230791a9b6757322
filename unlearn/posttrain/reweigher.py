"""The weights of one term's rows through a training: gathered over ranks, kept in checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn.objectives.verified import per_token
from unlearn.posttrain.reweighting import Cached, Rows, Stream, Weighting
from unlearn.posttrain.weights import effective_share
from unlearn.scores import Scores

Batch = Mapping[str, Tensor]
Gather = Callable[[Tensor], Tensor]
"""Puts tensors of one shape of all ranks end to end, by rank."""


def rows_of(scores: Scores, batch: Batch, unit: str) -> Rows:
    """Read a batch's rows off what the model says about them.

    ``unit`` is that of the objective: ``token`` or ``sequence``.
    """
    tokens = scores.num_tokens
    units = tokens if unit == "token" else (tokens > 0) & scores.attended.any(-1)
    losses = -per_token(scores).detach()
    return Rows(losses, units.to(losses.dtype), batch["index"])


def gathered(rows: Rows, gather: Gather, size: int) -> Rows:
    """Give the rows of a forward pass of all ranks; empty ones fill up what has fewer than size."""
    more, pad = size - len(rows.losses), torch.nn.functional.pad
    numbers = gather(pad(torch.stack([rows.losses, rows.units], 1), (0, 0, 0, more)))
    index = gather(pad(rows.index.to(numbers.device), (0, more), value=-1))
    return Rows(numbers[:, 0], numbers[:, 1], index)


class Reweigher:
    """Gives a factor for every row of a term's stream, whose mean over units is 1.

    ``rank`` and ``gather`` are those of the processes that share the data; ``size`` rows at most
    are in a forward pass of one of them. ``units`` are those of every row of the set, for the scope
    ``cached``.
    """

    def __init__(
        self, how: Weighting, *, unit: str, units: Tensor, rank: int, gather: Gather, size: int
    ) -> None:
        self.how, self.unit = how, unit
        self.rank, self.gather, self.size = rank, gather, size
        self.ratio = 1.0
        self.kept: Stream | Cached | None = None
        if how.scope == "stream":
            self.kept = Stream(how)
        elif how.scope == "cached":
            self.kept = Cached(how, units)
        self._seen: list[Rows] = []
        self._planned: list[Tensor] = []

    def begin(self, progress: float) -> bool:
        """Begin an optimiser step; tell whether the losses of all its rows are wanted first."""
        self.ratio = self.how.ratio(progress)
        self._seen, self._planned = [], []
        return self.how.scope == "step" and self.ratio > 1.0

    def plan(self, micros: Sequence[Rows]) -> None:
        """Weight all rows of a step against each other, before any of them is trained on."""
        whole = [gathered(rows, self.gather, self.size) for rows in micros]
        found = self.how.factors(Rows.joined(whole), self.ratio)
        for rows, part in zip(micros, found.split([len(r.losses) for r in whole]), strict=True):
            self._planned.append(self._mine(part, rows))

    def factors(self, scores: Scores, batch: Batch) -> Float[Tensor, " row"] | None:
        """Give the factors of the next forward pass's rows; None: all are 1."""
        rows = rows_of(scores, batch, self.unit)
        self._seen.append(rows)
        if self.ratio == 1.0:
            return None
        if self.how.scope == "step":
            return self._planned.pop(0)
        if self.kept is not None:
            return self.kept.factors(rows, self.ratio)
        return self._mine(
            self.how.factors(gathered(rows, self.gather, self.size), self.ratio), rows
        )

    def after_step(self) -> None:
        """Take in the rows of the step, of all ranks."""
        if self.kept is not None and self._seen:
            rows = Rows.joined([gathered(rows, self.gather, self.size) for rows in self._seen])
            self.kept.after_step(rows, self.ratio)

    def after_epoch(self) -> None:
        """Let what was found in an epoch count in the next."""
        if isinstance(self.kept, Cached):
            self.kept.after_epoch()

    def uneven(
        self, found: Float[Tensor, " row"], scores: Scores, batch: Batch
    ) -> dict[str, Tensor]:
        """Say how uneven factors are: effective share of the rows, and the largest factor."""
        valid = rows_of(scores, batch, self.unit).valid
        return {"weight_ess": effective_share(found, valid), "weight_max": found.max()}

    def state_dict(self) -> dict[str, Any] | None:
        """Give what a resumed training needs to go on; None when nothing is remembered."""
        return None if self.kept is None else self.kept.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from stored averages or losses."""
        assert self.kept is not None
        self.kept.load_state_dict(state)

    def _mine(self, found: Tensor, rows: Rows) -> Tensor:
        begin = self.rank * self.size
        return found[begin : begin + len(rows.losses)]
