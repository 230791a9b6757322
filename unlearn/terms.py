"""Terms: a training method is a weighted sum of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unlearn.objectives import Objective, Said
from unlearn.posttrain.reweighting import Weighting

Reads = tuple[str, int | None]
"""A stream, and the layer whose hidden states are read; None: log-probabilities."""


@dataclass(frozen=True)
class Term:
    """An objective on a stream, with a weight and its hyperparameters.

    ``rejected``, for an objective on pairs, is the stream of the answers to become less likely; its
    rows belong to those of ``on``, one to one. ``weighting`` lets the rows of ``on`` count by their
    losses; the objective must have one value per token or per sequence.
    """

    objective: Objective
    on: str
    weight: float = 1.0
    hyper: Mapping[str, Any] = field(default_factory=dict)
    rejected: str | None = None
    weighting: Weighting | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams it reads."""
        return (self.on,) if self.rejected is None else (self.on, self.rejected)

    @property
    def layer(self) -> int | None:
        """The layer it reads, when it reads hidden states."""
        if self.objective.reads != "hidden":
            return None
        return int({**self.objective.hyper, **self.hyper}["layer"])

    @property
    def reads(self) -> tuple[Reads, ...]:
        """The streams it reads, each with the layer."""
        return tuple((stream, self.layer) for stream in self.streams)

    def said(
        self, policy: Mapping[Reads, Said], reference: Mapping[Reads, Said]
    ) -> list[Said | None]:
        """Give what model and frozen start say about what it reads, stream by stream."""
        return [said for at in self.reads for said in (policy[at], reference.get(at))]

    @property
    def unit(self) -> str:
        """What its objective gives one value for: ``token``, ``sequence``, …."""
        return self.objective.unit

    @property
    def label(self) -> str:
        """How events and plots name it: ``forget/npo``."""
        weighted = "_reweighted" if self.weighting else ""
        return f"{self.on}/{self.objective.name}{weighted}"


def reads_of(terms: Iterable[Term]) -> list[Reads]:
    """List what terms read, each once."""
    return list(dict.fromkeys(read for term in terms for read in term.reads))
