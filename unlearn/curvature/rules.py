"""How long the steps of an edit are, and when they end."""

from dataclasses import dataclass
from typing import Literal

from unlearn.curvature.steps import Goal, Reading

StepRule = Literal["search", "fixed", "trust_region", "influence"]
AT_GOAL = 0.99
"""No further step is taken from this share of a goal on."""


@dataclass(frozen=True)
class Rule:
    """How long steps are and when they end; losses and KL in nats per token."""

    step_rule: StepRule
    steps: int
    size: float | None = None
    forget_nll: float | None = None
    retain_kl: float | None = None

    def mistake(self) -> str | None:
        """Say why this cannot be followed; None when it can."""
        sized = self.step_rule in ("fixed", "trust_region")
        if sized and self.size is None:
            return (
                f"step_rule: {self.step_rule} needs step_size (fixed: the scale α; trust_region: "
                "the predicted KL of a step, in nats per token)"
            )
        if not sized and self.size is not None:
            return f"step_size given, which step_rule: {self.step_rule} does not use: leave it out"
        if self.step_rule == "search" and self.forget_nll is None and self.retain_kl is None:
            return (
                "step_rule: search needs a goal: set forget_nll (nats per token, or `unseen`: what "
                "the model gives the rows of data.unseen), retain_kl, or both"
            )
        return None

    def goal(self, step: int, now: Reading) -> Goal:
        """Give what step number ``step`` (from 1) aims at: an equal share of what is left."""
        limit = float("inf") if self.retain_kl is None else self.retain_kl
        if self.forget_nll is None:
            return Goal(None, limit * step / self.steps)
        rise = (self.forget_nll - now.nll) / (self.steps - step + 1)
        return Goal(now.nll + rise, limit, rise)

    def ends(self, now: Reading) -> str | None:
        """Say why no further step is taken; None when one is."""
        if self.forget_nll is not None and now.nll >= AT_GOAL * self.forget_nll:
            return "forget_nll reached"
        if self.retain_kl is not None and now.kl >= AT_GOAL * self.retain_kl:
            return "retain_kl reached"
        return None
