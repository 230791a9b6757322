"""K-FADE: a few uphill Gauss–Newton steps on the forget loss, in the metric of the retain KL."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt

from unlearn.curvature.damping import Damping, DampingText
from unlearn.curvature.direction import Direction, direction
from unlearn.curvature.distance import Reference, mean_nll, spaced
from unlearn.curvature.factors import Kind
from unlearn.curvature.fit import (
    Curvature,
    FitSettings,
    Gradient,
    fit_curvature,
    gradient,
    identity_of,
)
from unlearn.curvature.labels import Fisher
from unlearn.curvature.layers import LayerSet, Tracked, find_layers
from unlearn.curvature.passes import Rows
from unlearn.curvature.steps import EVALUATIONS, Goal, Reading, Weights, search
from unlearn.curvature.storage import load_curvature, save_curvature
from unlearn.data.encode import Example
from unlearn.edits.update import stored_change
from unlearn.errors import RunFailed, UserError
from unlearn.models import weights_hash
from unlearn.monitors import peak_memory_bytes
from unlearn.ranks import Ranks
from unlearn.scores import IGNORE, Scorer

StepRule = Literal["search", "fixed", "trust_region", "influence"]
Listen = Callable[[dict[str, Any]], None]
SMALLEST_PART = 5
"""Held-out rows are at most one in this many of the retain rows."""


def kfade(  # noqa: PLR0913 - each is a key of the recipe's edit section
    model: Any,
    data: Mapping[str, Sequence[Example]],
    listen: Listen = lambda event: None,
    seed: int = 0,
    *,
    steps: PositiveInt = 4,
    step_rule: StepRule = "search",
    step_size: PositiveFloat | None = None,
    forget_nll: PositiveFloat | None = None,
    retain_kl: PositiveFloat | None = None,
    curvature: Kind = "kfac",
    damping: DampingText = "factored:1e-3",
    layers: LayerSet | list[str] = "mlp",
    refit: bool = False,
    fisher: Fisher = "mc",
    label_draws: PositiveInt = 1,
    retain_tokens: PositiveInt | None = 1_000_000,
    held_out: PositiveInt = 64,
    forget_rows: PositiveInt = 256,
    batch_tokens: PositiveInt = 8192,
    max_factor_dim: PositiveInt = 16384,
    factors: str | None = None,
    update_rank: PositiveInt | None = None,
) -> Any:
    """Raise the loss of the forget rows where that moves the outputs on the retain rows least.

    Each step is δ = α (H + λI)⁻¹g: g is the gradient of the mean forget loss (nats per token),
    taken anew, H the curvature of KL(start || model) per retain token, ``refit`` or not. The step
    goes up the loss. Weights of linear layers change, in place; biases, embeddings, norms and head
    do not. Source: McKinney et al. 2026, arXiv:2602.10568. Ours, and not the paper's: the search
    for α, the factored damping, several steps, the held-out KL, and all defaults.

    ``step_rule``: ``search`` measures after trial steps and takes the longest that reaches its
    share of the way to ``forget_nll`` and stays within ``retain_kl`` (on ``held_out`` rows that H
    never sees); ``fixed`` takes α = ``step_size``; ``trust_region`` the α whose predicted KL is
    ``step_size``; ``influence`` α = (forget tokens / retain tokens) / steps, the Newton step to
    where retain rows alone would lead. Whatever the rule, the loop ends at ``forget_nll`` or
    ``retain_kl``.

    ``retain_tokens`` caps the labelled tokens that H is fitted to; ``forget_rows`` those rows that
    are measured. ``factors`` names a file: read when it is there, else written. ``listen`` is told
    of progress, a ``step`` after every step, and in the end an ``update``: what was added to each
    weight, in fp32, and the ``update_rank`` that it is to be kept in (None: whole).
    """
    rule = Rule(step_rule, steps, step_size, forget_nll, retain_kl)
    if why := rule.mistake() or _unkept(refit, factors):
        raise UserError(why)
    settings = FitSettings(curvature, fisher, label_draws, max_factor_dim, seed)
    rows = Parts.of(data, held_out, retain_tokens, forget_rows, batch_tokens)
    if rows.warning:
        listen({"event": "warning", "message": rows.warning})
    tracked, scorer = find_layers(model, layers), Scorer.for_model(model)
    keep = Path(factors) if factors else None
    loop = Loop(model, rows, tracked, scorer, rule, Damping.parse(damping), listen)
    fit = partial(_fitted, model, rows, tracked, settings, scorer, keep, listen)
    with _warnings_told(listen):
        loop.run(fit, refit=refit)
    now, added = {layer.name: layer.weight for layer in tracked}, loop.weights.total
    stored = stored_change(loop.weights.start, now, added)
    listen({"event": "update", "weights": loop.weights.changes(), "rank": update_rank, **stored})
    return model


@contextmanager
def _warnings_told(listen: Listen) -> Iterator[None]:
    """Tell the listener of our own warnings too, and let all of them go on their way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in caught:
        if one.category is UserWarning:
            listen({"event": "warning", "message": str(one.message)})
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


@dataclass(frozen=True)
class Rule:
    """How long steps are and when they end."""

    step_rule: StepRule
    steps: int
    size: float | None
    forget_nll: float | None
    retain_kl: float | None

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
                "step_rule: search needs a goal: set forget_nll (nats per token, for instance what "
                "the model gives text of this kind that it has not seen), retain_kl, or both"
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
        if self.forget_nll is not None and now.nll >= 0.99 * self.forget_nll:
            return "forget_nll reached"
        if self.retain_kl is not None and now.kl >= 0.99 * self.retain_kl:
            return "retain_kl reached"
        return None


def _unkept(refit: bool, factors: str | None) -> str | None:
    """Say that a file holds one curvature, when one would be fitted in every step."""
    if refit and factors is not None:
        return "factors given with refit: a file keeps one curvature; leave one of them out"
    return None


def settings_mistake(hyper: Mapping[str, Any]) -> str | None:
    """Say what is wrong with hyperparameters together, each of them right by itself."""
    rule = Rule(
        hyper["step_rule"],
        hyper["steps"],
        hyper["step_size"],
        hyper["forget_nll"],
        hyper["retain_kl"],
    )
    unpredicted = hyper["curvature"] == "act" and rule.step_rule == "trust_region"
    if unpredicted:
        return "step_rule: trust_region needs a predicted KL, which curvature: act does not give"
    return rule.mistake() or _unkept(hyper["refit"], hyper["factors"])


@dataclass(frozen=True)
class Parts:
    """Rows by what they are for."""

    forget: Rows
    fit: Rows
    held_out: Rows
    measured: Rows
    warning: str = ""

    @classmethod
    def of(
        cls,
        data: Mapping[str, Sequence[Example]],
        held_out: int,
        retain_tokens: int | None,
        forget_rows: int,
        batch_tokens: int,
    ) -> "Parts":
        """Hold out retain rows at equal distances, and cap the others by labelled tokens."""
        if "retain" not in data:
            raise UserError("kfade needs retain rows: its metric is their KL", "give --retain")
        forget, retain = list(data["forget"]), list(data["retain"])
        apart = spaced(retain, min(held_out, len(retain) // SMALLEST_PART)) if retain[4:] else []
        taken = set(apart)
        rest = [one for place, one in enumerate(retain) if place not in taken]
        warning = "" if apart else "too few retain rows to hold any out: KL is that of fitted rows"
        held = [retain[place] for place in apart] or retain
        few = [forget[place] for place in spaced(forget, forget_rows)]
        parts = (forget, _capped(rest, retain_tokens), held, few)
        first, second, third, fourth = (Rows(part, batch_tokens=batch_tokens) for part in parts)
        return cls(first, second, third, fourth, warning)


def _capped(examples: list[Example], tokens: int | None) -> list[Example]:
    """Give all rows, or as many at equal distances as have about this many labelled tokens."""
    total = num_labels(examples)
    if tokens is None or total <= tokens:
        return examples
    return [examples[place] for place in spaced(examples, max(1, len(examples) * tokens // total))]


def num_labels(examples: Sequence[Example]) -> int:
    """Count the tokens that are predicted and labelled."""
    return sum(label != IGNORE for one in examples for label in one.labels[1:])


def _fitted(
    model: Any,
    parts: Parts,
    layers: Sequence[Tracked],
    settings: FitSettings,
    scorer: Scorer,
    keep: Path | None,
    listen: Listen,
) -> Curvature:
    """Fit the curvature at the weights as they are now, or read it from the file that keeps it."""
    rows = told(parts.fit, "curvature of the retain set", listen)
    if keep is None:
        return fit_curvature(model, rows, layers, settings, scorer=scorer)
    identity = identity_of(weights_hash(model), rows.examples, layers, settings)
    ranks = Ranks.of(model)
    if ranks.all(keep.is_file()):
        return load_curvature(keep, identity, device=model.device)
    found = fit_curvature(model, rows, layers, settings, identity=identity, scorer=scorer)
    ranks.first(lambda: save_curvature(found, keep))
    return found


def told(rows: Rows, what: str, listen: Listen) -> Rows:
    """Give the same rows, whose passes are told of as progress."""

    def progress(done: int, total: int) -> None:
        listen({"event": "progress", "what": what, "done": done, "total": total})

    return replace(rows, progress=progress)


@dataclass
class Loop:
    """The steps of one edit: what they need, what they have come to, who listens."""

    model: Any
    rows: Parts
    layers: Sequence[Tracked]
    scorer: Scorer
    rule: Rule
    damping: Damping
    listen: Listen

    def __post_init__(self) -> None:
        self.weights = Weights(self.layers)

    def run(self, fit: Callable[[], Curvature], *, refit: bool) -> list[dict[str, Any]]:
        """Take the steps; give a record of each."""
        started = time.monotonic()
        reference = Reference.of(self.model, self.rows.held_out, self.scorer)
        measure = partial(self._measured, reference)
        now, records = measure(None, 0.0), []
        curvature: Curvature | None = None
        for step in range(1, self.rule.steps + 1):
            if self.rule.ends(now):
                break
            grad = gradient(
                self.model, told(self.rows.forget, "forget gradient", self.listen), self.layers,
                scorer=self.scorer,
            )  # fmt: skip
            curvature = fit() if curvature is None or refit else curvature
            ahead = direction(curvature, grad, self.damping, ranks=Ranks.of(self.model))
            record = self._step(step, now, ahead, curvature, grad, measure)
            if record is None:
                break
            alpha, now, more = record
            self.weights.take(ahead, alpha)
            event = _event(step, self.rule.steps, alpha, now, ahead)
            event |= more | {"seconds": round(time.monotonic() - started, 3),
                             "tokens": self._tokens(step, refit)}  # fmt: skip
            self.listen(event)
            records.append(event)
        self.weights.put()
        if not records:
            raise RunFailed(
                f"no step was taken: the forget loss is {now.nll:.3f} nats per token, the KL "
                f"{now.kl:.4f}, and every trial went too far or nothing was left to do",
                "raise forget_nll or retain_kl",
            )
        return records

    def _measured(self, reference: Reference, step: Direction | None, alpha: float) -> Reading:
        self.weights.put(step, alpha)
        nll = mean_nll(self.model, self.rows.measured, self.scorer)
        return Reading(nll, reference.kl(self.model))

    def _step(
        self,
        step: int,
        now: Reading,
        ahead: Direction,
        curvature: Curvature,
        grad: Gradient,
        measure: Callable[[Direction | None, float], Reading],
    ) -> tuple[float, Reading, dict[str, Any]] | None:
        """Choose the scale; None when no step stays within bounds."""
        if not ahead.slope > 0:
            raise RunFailed("the forget set has no gradient: nothing can be raised", "")
        if self.rule.step_rule != "search":
            alpha = self._scale(ahead, grad, curvature)
            reading = measure(ahead, alpha)
            if not torch.isfinite(torch.tensor([reading.nll, reading.kl])).all():
                raise RunFailed("the model gives no finite loss after the step", "lower step_size")
            return alpha, reading, {"evaluations": 1}
        goal = self.rule.goal(step, now)
        trial = 0

        def attempt(alpha: float) -> Reading:
            nonlocal trial
            trial += 1
            self.listen({"event": "progress", "what": f"step {step}: trial", "done": trial,
                         "total": EVALUATIONS})  # fmt: skip
            return measure(ahead, alpha)

        found = search(attempt, now, _start(ahead, goal), goal)
        if found is None:
            return None
        return found.alpha, found.reading, {"evaluations": found.evaluations}

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

    def _tokens(self, step: int, refit: bool) -> int:
        """Count the tokens that went forward and back so far; trials go forward only."""
        forget, fit = (sum(len(one.input_ids) for one in rows.examples)
                       for rows in (self.rows.forget, self.rows.fit))  # fmt: skip
        return step * forget + (step if refit else 1) * fit


def _start(ahead: Direction, goal: Goal) -> float:
    """Give the scale that the quadratic model suggests."""
    if goal.nll is not None:
        return max(goal.rise, 1e-6) / ahead.slope
    return ahead.trust_region(goal.kl) if ahead.bend else 0.5 / ahead.slope


def _event(step: int, steps: int, alpha: float, now: Reading, ahead: Direction) -> dict[str, Any]:
    amounts = list(ahead.dampings.values())
    return {
        "event": "step",
        "step": step,
        "of": steps,
        "forget/nll": now.nll,
        "retain/kl": now.kl,
        "alpha": alpha,
        "predicted_gain": ahead.gain(alpha),
        "predicted_kl": ahead.kl(alpha),
        "damping": [min(amounts), median(amounts), max(amounts)],
        "memory_bytes": peak_memory_bytes(),
    }
