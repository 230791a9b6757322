"""The steps of K-FADE: gradient, direction, scale, and what each has come to."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from unlearn.curvature.damping import Damping
from unlearn.curvature.direction import Direction, direction
from unlearn.curvature.distance import Reference, mean_nll
from unlearn.curvature.fit import Curvature, Gradient, gradient, kl_gradient
from unlearn.curvature.kept import Kept
from unlearn.curvature.labels import Ascend
from unlearn.curvature.layers import Tracked
from unlearn.curvature.parts import Listen, Parts, told
from unlearn.curvature.passes import Rows
from unlearn.curvature.rules import Rule
from unlearn.curvature.steps import EVALUATIONS, Found, Goal, Reading, Weights, search
from unlearn.errors import RunFailed, UserError
from unlearn.monitors import peak_memory_bytes
from unlearn.ranks import Ranks
from unlearn.scores import Scorer

Fit = Callable[[bool], Curvature]
"""Fits the curvature to the weights as they are; told whether these are those of the start."""
PARTS = (1.0, 0.3, 0.1, 0.03)
"""Parts of a step back that are tried, until one lowers the KL that is measured."""


@dataclass
class Ascent:
    """The steps of one edit: what they need, what they have come to, who listens."""

    model: Any
    rows: Parts
    layers: Sequence[Tracked]
    scorer: Scorer
    rule: Rule
    damping: Damping
    listen: Listen
    ascend: Ascend = "nll"
    correct: bool = True
    kept: Kept | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = Weights(self.layers)
        self.started, self.tokens = time.monotonic(), 0

    def run(self, fit: Fit, *, refit: bool) -> None:
        """Take the steps, those after what was kept; each is told of.

        Raises:
            RunFailed: not one step could be taken.
        """
        reference = Reference.of(self.model, self.rows.held_out, self.scorer)
        if self.correct:
            self.start = Reference.of(self.model, self.rows.fit, self.scorer)
        now = self._measured(reference)
        curvature = None if refit or self.rule.ends(now) else self._fitted(fit, 1)
        if self.kept and (found := self.kept.load()):
            totals, self.records = found
            self.weights.restore(totals)
            now = self._measured(reference)
        for step in range(len(self.records) + 1, self.rule.steps + 1):
            if self.rule.ends(now):
                break
            after = self._step(step, now, curvature or self._fitted(fit, step), reference)
            if after is None:
                break
            now = after
        self.weights.put()
        if not self.records:
            raise self._without_steps(now)

    def _without_steps(self, now: Reading) -> RunFailed:
        where = f"the forget loss is {now.nll:.3f} nats per token, the KL {now.kl:.4f}"
        if self.rule.ends(now):
            return RunFailed(
                f"no step was taken: {where}, which forget_nll or retain_kl already end at",
                "raise the goal, or leave the model as it is",
            )
        return RunFailed(
            f"no step was taken: {where}, and every trial step went too far",
            "raise forget_nll or retain_kl, or the damping",
        )

    def _fitted(self, fit: Fit, step: int) -> Curvature:
        self.tokens += num_tokens(self.rows.fit)
        return fit(step == 1)

    def _measured(
        self, reference: Reference, step: Direction | None = None, alpha: float = 0.0
    ) -> Reading:
        self.weights.put(step, alpha)
        nll = mean_nll(self.model, self.rows.measured, self.scorer)
        return Reading(nll, reference.kl(self.model))

    def _step(
        self, step: int, now: Reading, curvature: Curvature, reference: Reference
    ) -> Reading | None:
        """Take one step; None when none stays within bounds."""
        back = 0.0
        if self.correct and step > 1:
            now, back = self._corrected(now, curvature, reference)
        rows = told(self.rows.forget, "forget gradient", self.listen)
        grad = gradient(self.model, rows, self.layers, ascend=self.ascend, scorer=self.scorer)
        self.tokens += num_tokens(rows)
        ahead = direction(curvature, grad, self.damping, ranks=Ranks.of(self.model))
        _require_step(ahead)
        found = self._scaled(step, now, ahead, grad, curvature, reference)
        if found is None:
            return None
        self.weights.take(ahead, found.alpha)
        self._keep(
            _record(step, self.rule, now, found, ahead)
            | {"correction": back, "corrected_kl": now.kl}
            | self._spent()
        )
        return found.reading

    def _corrected(
        self, now: Reading, curvature: Curvature, reference: Reference
    ) -> tuple[Reading, float]:
        """Go down the KL on the fitted rows along (H + λI)⁻¹r, and say by how much (β).

        β = KL / rᵀ(H + λI)⁻¹r is half a Newton step where the KL is quadratic, and does not depend
        on the scale of H, which is far off where H was fitted to other weights.
        """
        rows = told(self.start.rows, "retain KL gradient", self.listen)
        grad = kl_gradient(self.model, self.start, self.layers, progress=rows)
        self.tokens += num_tokens(rows)
        back = direction(curvature, grad, self.damping, ranks=Ranks.of(self.model))
        for part in PARTS if back.slope > 0 else ():
            beta = part * now.kl / back.slope
            found = self._measured(reference, back, -beta)
            if found.kl < now.kl:
                self.weights.take(back, -beta)
                return found, beta
        self.weights.put()
        return now, 0.0

    def _spent(self) -> dict[str, Any]:
        """Say what it has taken since this call began; tokens that went forward and back."""
        seconds = round(time.monotonic() - self.started, 3)
        return {"seconds": seconds, "tokens": self.tokens, "memory_bytes": peak_memory_bytes()}

    def _keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.listen({"event": "step", **record})
        if kept := self.kept:  # last: a step that is told of twice counts once
            Ranks.of(self.model).first(lambda: kept.save(self.weights.total, self.records))

    def _scaled(
        self,
        step: int,
        now: Reading,
        ahead: Direction,
        grad: Gradient,
        curvature: Curvature,
        reference: Reference,
    ) -> Found | None:
        """Choose the scale; None when no step stays within bounds."""
        measure = partial(self._measured, reference, ahead)
        if self.rule.step_rule == "search":
            goal = self.rule.goal(step, now)
            start = self._start(ahead, goal)
            return search(self._told(measure, step), now, start, goal)
        alpha = self._scale(ahead, grad, curvature)
        reading = measure(alpha)
        if not (math.isfinite(reading.nll) and math.isfinite(reading.kl)):
            raise RunFailed("the model gives no finite loss after the step", "lower step_size")
        return Found(alpha, reading, 1)

    def _told(self, measure: Callable[[float], Reading], step: int) -> Callable[[float], Reading]:
        trials = iter(range(1, EVALUATIONS + 1))

        def attempt(alpha: float) -> Reading:
            what = f"step {step}: trial"
            self.listen(
                {"event": "progress", "what": what, "done": next(trials), "total": EVALUATIONS}
            )
            return measure(alpha)

        return attempt

    def _start(self, ahead: Direction, goal: Goal) -> float:
        """Give a scale to begin with: the gain of the last step, or what the model predicts."""
        if self.records:
            return float(self.records[-1]["predicted_gain"]) / ahead.slope
        if goal.nll is not None:
            return max(goal.rise, 1e-6) / ahead.slope
        return ahead.trust_region(goal.kl) if ahead.bend else 0.5 / ahead.slope

    def _scale(self, ahead: Direction, grad: Gradient, curvature: Curvature) -> float:
        size = self.rule.size
        if self.rule.step_rule == "influence":
            return grad.num_labels / curvature.counts.labels / self.rule.steps
        assert size is not None
        if self.rule.step_rule == "fixed":
            return size
        if ahead.bend is None:
            raise UserError("step_rule: trust_region needs a predicted KL, which act has not", "")
        return ahead.trust_region(size)


def _require_step(ahead: Direction) -> None:
    """Refuse a direction that is none: no gradient, or a curvature that could not be inverted."""
    if not all(math.isfinite(one) for one in (ahead.slope, ahead.bend or 0.0)):
        least, most = min(ahead.dampings.values()), max(ahead.dampings.values())
        raise RunFailed(
            "the step is not finite: the curvature is singular, and its damping too small to "
            f"invert it (λ is {least:.2g} to {most:.2g})",
            "give a larger edit.damping, or more retain rows",
        )
    if not ahead.slope > 0:
        raise RunFailed("the forget set has no gradient: nothing can be raised", "")


def num_tokens(rows: Rows) -> int:
    """Count the tokens of rows, prompts with them."""
    return sum(len(one.input_ids) for one in rows.examples)


def _record(
    step: int, rule: Rule, before: Reading, found: Found, ahead: Direction
) -> dict[str, Any]:
    """Say what a step was expected to change and what it has changed, in nats per token."""
    amounts = list(ahead.dampings.values())
    now = found.reading
    return {
        "step": step,
        "of": rule.steps,
        "forget/nll": now.nll,
        "retain/kl": now.kl,
        "gain": now.nll - before.nll,
        "kl_spent": now.kl - before.kl,
        "kl_budget": rule.retain_kl,
        "alpha": found.alpha,
        "predicted_gain": ahead.gain(found.alpha),
        "predicted_kl": ahead.kl(found.alpha),
        "damping": [min(amounts), median(amounts), max(amounts)],
        "evaluations": found.evaluations,
    }
