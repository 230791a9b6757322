"""Objectives that remember: a small dataclass with ``__call__`` and a state.

Its constructor's keyword arguments are the hyperparameters. After each optimiser step the trainer
tells it the step's means (:class:`StepMeans`), over all micro-batches and ranks; its state travels
in every checkpoint. The trainer knows no more than the protocol :class:`Stateful`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from unlearn.scores import Scores

SLACK = 1.1
"""The retain loss may be this many times what it was at the start, when no bound is given."""


@dataclass(frozen=True)
class StepMeans:
    """What a term may learn from an optimiser step.

    ``value``: the mean of the term over its units, before its weight. ``nll``: the mean token NLL
    of its stream, in nats (NaN when it is not read). ``epoch``: passes over the forget set so far.
    """

    value: float
    nll: float
    epoch: float


@runtime_checkable
class Stateful(Protocol):
    """An objective with a state: plain numbers by name, equal on every rank."""

    def after_step(self, means: StepMeans) -> None: ...

    def state_dict(self) -> dict[str, float | None]: ...

    def load_state_dict(self, state: Mapping[str, float | None]) -> None: ...


@dataclass(kw_only=True)
class pdu_retain:
    """Keep the retain loss below a bound: the token NLL times a multiplier that finds its own size.

    Nats per token times the multiplier. After each optimiser step the multiplier grows by
    ``step_size * (loss - epsilon)``, with the step's mean retain loss, and never falls below 0;
    not during the first ``warmup_epochs``. ``epsilon`` (nats per token) is 1.1 times the first
    step's retain loss when it is not given: the loss before any change, on the rows of that step.
    Source: PDU, Entesari et al. 2025, arXiv:2506.05314; ``multiplier`` and ``step_size`` as for
    TOFU. Deviations: one update per optimiser step from the mean over all ranks (open-unlearning:
    one per micro-batch, from its own rank); the constant ``-multiplier * epsilon`` of the
    Lagrangian, which has no gradient, is left out.
    """

    multiplier: NonNegativeFloat = 100.0
    step_size: NonNegativeFloat = 5.0
    epsilon: PositiveFloat | None = None
    warmup_epochs: NonNegativeFloat = 5.0
    bound: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.bound = self.epsilon

    def __call__(self, policy: Scores) -> Float[Tensor, "batch seq"]:
        """Give each labelled token's weighted loss."""
        return -self.multiplier * policy.log_probs

    def after_step(self, means: StepMeans) -> None:
        """Move the multiplier by how far the retain loss is from its bound."""
        if self.bound is None:
            self.bound = SLACK * means.nll
        if means.epoch > self.warmup_epochs:
            change = self.step_size * (means.nll - self.bound)
            self.multiplier = max(0.0, self.multiplier + change)

    def state_dict(self) -> dict[str, float | None]:
        """Give the multiplier and the bound."""
        return {"multiplier": self.multiplier, "bound": self.bound}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Go on from a stored multiplier and bound."""
        multiplier, self.bound = state["multiplier"], state["bound"]
        assert multiplier is not None
        self.multiplier = multiplier
