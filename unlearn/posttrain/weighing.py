"""What the trainer asks about weights of rows: one answer for all of its terms."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unlearn.data.encode import IGNORE, Example
from unlearn.posttrain.reweigher import Batch, Gather, Reweigher
from unlearn.posttrain.reweighting import Rows, Weighting
from unlearn.scores import Scores


@runtime_checkable
class Weighted(Protocol):
    """A term, as far as the weights of its rows go."""

    @property
    def on(self) -> str: ...

    @property
    def unit(self) -> str: ...

    @property
    def weighting(self) -> Weighting | None: ...


class Weighing:
    """The weights of the rows of all terms: those that rows carry, and those by their losses."""

    def __init__(
        self,
        terms: Sequence[Weighted],
        streams: Mapping[str, Sequence[Example]],
        *,
        rank: int,
        processes: int,
        gather: Gather,
        size: int,
    ) -> None:
        self.terms, self.processes, self.passes = terms, processes, 1
        self.weighers = [
            Reweigher(
                term.weighting,
                unit=term.unit,
                units=_units(streams[term.on], term.unit),
                rank=rank,
                gather=gather,
                size=size,
            )
            if term.weighting
            else None
            for term in terms
        ]

    @property
    def active(self) -> bool:
        """Whether a term's rows are weighted by their losses."""
        return any(self.weighers)

    def begin(self, progress: float, passes: int) -> list[int]:
        """Begin a step of so many forward passes; name the terms whose losses are wanted first."""
        self.passes = passes
        weighers = enumerate(self.weighers)
        return [place for place, one in weighers if one and one.begin(progress)]

    def plan(self, place: int, micros: Sequence[Rows]) -> None:
        """Weight all rows of a step of one term against each other."""
        weigher = self.weighers[place]
        assert weigher is not None
        weigher.plan(micros)

    def apply(
        self, place: int, losses: Tensor, scores: Any, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Multiply a term's losses by the weights of their rows; say how uneven those are.

        What is said are shares of the step's means, as the trainer adds them up.
        """
        weigher, on = self.weighers[place], self.terms[place].on
        if "weight" in batch:
            losses = losses * _along(batch["weight"], losses)
        if weigher is None:
            return losses, {}
        assert isinstance(scores, Scores)
        found = weigher.factors(scores, batch)
        if found is None:
            return losses, {}
        told = weigher.uneven(found, scores, batch)
        shares = {
            f"{on}/{name}": value / self.passes / self.processes for name, value in told.items()
        }
        return losses * _along(found, losses), shares

    def after_step(self) -> None:
        """Take in what a step has shown."""
        for weigher in filter(None, self.weighers):
            weigher.after_step()

    def after_epoch(self) -> None:
        """Let what was found in an epoch count in the next."""
        for weigher in filter(None, self.weighers):
            weigher.after_epoch()

    def state(self) -> list[dict[str, Any] | None]:
        """Give what is to be remembered in a checkpoint, term by term."""
        return [weigher.state_dict() if weigher else None for weigher in self.weighers]

    def load(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        """Go on from what a checkpoint remembers."""
        for weigher, kept in zip(self.weighers, states, strict=True):
            if weigher and kept:
                weigher.load_state_dict(kept)


def _units(examples: Sequence[Example], unit: str) -> Tensor:
    tokens = [sum(label != IGNORE for label in row.labels[1:]) for row in examples]
    counts = torch.tensor(tokens, dtype=torch.float32)
    return counts if unit == "token" else (counts > 0).float()


def _along(values: Tensor, losses: Tensor) -> Tensor:
    """Lay one value per row along the losses, which may have one per token."""
    return values.to(losses.dtype).reshape(-1, *[1] * (losses.dim() - 1))
