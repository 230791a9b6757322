"""Adding an update again to a model that was trained further, no longer than it has to be."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt

from unlearn.curvature.distance import Reference, mean_nll, spaced
from unlearn.curvature.parts import Listen
from unlearn.curvature.passes import Rows
from unlearn.curvature.steps import EVALUATIONS, Goal, Reading, search
from unlearn.data.encode import Example
from unlearn.edits.update import (
    Update,
    check_fits,
    check_scale,
    is_start,
    load_update,
    stored_change,
)
from unlearn.errors import RunFailed, UserError
from unlearn.head import plain
from unlearn.monitors import peak_memory_bytes
from unlearn.scores import Scorer

FIRST = 0.25
"""Where the search begins: the whole update (1) may be far too much for weights that have moved."""
LARGEST = 2.0
"""Longest scale that is tried; an update that does not reach the goal at twice its length has
little to do with this model."""

Scale = Literal["search"] | float


def reapply(  # noqa: PLR0913 - each is a key of the recipe's edit section
    model: Any,
    data: Mapping[str, Sequence[Example]],
    listen: Listen = lambda event: None,
    *,
    update: str | None = None,
    scale: Scale = "search",
    forget_nll: PositiveFloat | None = None,
    retain_kl: PositiveFloat | None = None,
    forget_rows: PositiveInt = 256,
    retain_rows: PositiveInt = 256,
    batch_tokens: PositiveInt = 8192,
) -> Any:
    """Add the update of an earlier edit, times ``scale``, to a model of the same shape, in place.

    ``update`` is the ``update.safetensors`` of a run, or of ``unlearn edit diff``. ``scale``: a
    number, or ``search``: see :func:`search_scale`, which the other parameters belong to. Nothing
    is fitted, so all retain rows are held out; ``forget_rows`` and ``retain_rows`` cap how many are
    measured. ``listen`` is told of every ``trial``, of one ``step``, and in the end of an
    ``update``: what was added here.

    Source: ours; McKinney et al. 2026, arXiv:2602.10568, tell of adding an update again, not how.
    """
    if why := settings_mistake({"scale": scale, "forget_nll": forget_nll, "retain_kl": retain_kl}):
        raise UserError(why)
    if update is None:
        raise UserError("edit reapply needs update", "name the update.safetensors of a run")
    if "retain" not in data:
        raise UserError("reapply needs retain rows: their KL is its bound", "give --retain")
    started, given = time.monotonic(), load_update(Path(update))
    added = Added(model, given)
    forget, retain = (
        Rows([data[name][place] for place in spaced(data[name], number)], batch_tokens=batch_tokens)
        for name, number in (("forget", forget_rows), ("retain", retain_rows))
    )
    began = is_start(model, given)
    goals = Goals(forget_nll, retain_kl)
    found = search_scale(added, forget, retain, goals, scale=scale, listen=listen)
    if found.missed:
        listen({"event": "warning", "message": f"a goal was missed {found.missed}"})
    listen(_event(found, forget, retain, time.monotonic() - started) | {"kl_budget": retain_kl})
    listen({"event": "update", **added.told(found.scale), "is_start": began,
            "origin": dict(given.about), **found.told()})  # fmt: skip
    return model


def settings_mistake(hyper: Mapping[str, Any]) -> str | None:
    """Say what is wrong with hyperparameters together, each of them right by itself."""
    if hyper["scale"] == "search":
        if hyper["forget_nll"] is not None or hyper["retain_kl"] is not None:
            return None
        return (
            "scale: search needs a goal: set forget_nll (nats per token, for instance what the "
            "model gives text of this kind that it has not seen), retain_kl, or both"
        )
    if not (math.isfinite(hyper["scale"]) and hyper["scale"]):
        return f"scale: {hyper['scale']} given; must be search or a finite number other than 0"
    return None


@dataclass(frozen=True)
class Goals:
    """A forget loss to reach and a KL not to exceed, in nats per token; at least one of them."""

    forget_nll: float | None = None
    retain_kl: float | None = None

    def missed(self, found: Reading, scale: float) -> str:
        """Say which of them a scale does not come to; empty when it comes to both."""
        lost = []
        if self.forget_nll is not None and found.nll < 0.95 * self.forget_nll:
            lost.append(f"forget loss {found.nll:.3f}, below forget_nll {self.forget_nll:g}")
        if self.retain_kl is not None and found.kl > self.retain_kl:
            lost.append(f"KL {found.kl:.4f}, above retain_kl {self.retain_kl:g}")
        return f"at scale {scale:.3g}: {'; '.join(lost)}" if lost else ""

    def goal(self, now: Reading) -> Goal:
        """Give what the search aims at from here."""
        limit = math.inf if self.retain_kl is None else self.retain_kl
        if self.forget_nll is None:
            return Goal(None, limit)
        return Goal(self.forget_nll, limit, self.forget_nll - now.nll)


@dataclass
class Added:
    """A model whose weights are start + scale · update, whatever was tried before.

    Each scale is added to the weights as they were, in fp32, and rounded once: trials leave no
    trace. The update itself stays where it is (on the CPU, as it was read).
    """

    model: Any
    update: Update

    def __post_init__(self) -> None:
        check_fits(self.model, {name: one.shape for name, one in self.update.kept.items()})
        own = dict(plain(self.model).named_parameters())
        self.weights = {name: own[name] for name in self.update.kept}
        self.start = {name: one.detach().clone() for name, one in self.weights.items()}

    @torch.no_grad()
    def put(self, scale: float) -> None:
        """Write the weights; 0 gives those of the start, bit for bit."""
        for name, weight in self.weights.items():
            start = self.start[name]
            weight.copy_(self.update.added_to(start, name, scale) if scale else start)

    def told(self, scale: float) -> dict[str, Any]:
        """Give what was added, and what of it is left in the weights as they are stored."""
        scaled = self.update.scaled(scale)
        stored = stored_change(self.start, self.weights, scaled.weights)
        return {"weights": scaled.kept, "remainders": scaled.remainders, **stored}


@dataclass(frozen=True)
class FoundScale:
    """The scale that was taken, what was measured there and at the start, and all trials."""

    scale: float
    start: Reading
    reading: Reading
    trials: list[dict[str, float]] = field(default_factory=list)
    missed: str = ""
    """Which goal was not come to; empty when all were."""

    def told(self) -> dict[str, Any]:
        """Give it for results."""
        return {"scale": self.scale, "trials": self.trials, "missed": self.missed,
                "start": {"forget/nll": self.start.nll, "retain/kl": self.start.kl}}  # fmt: skip


def search_scale(
    added: Added,
    forget: Rows,
    retain: Rows,
    goals: Goals,
    *,
    scale: Scale = "search",
    listen: Listen = lambda event: None,
) -> FoundScale:
    """Leave the model at the scale whose forget loss comes to its goal within the bound on the KL.

    Measured are the mean forget loss and KL(model before || after) on the retain rows, both in nats
    per token. The search is K-FADE's (:func:`unlearn.curvature.steps.search`): it begins at
    ``FIRST``, tries up to ``EVALUATIONS`` scales up to ``LARGEST``, and takes the longest that is
    not too far. With a number for ``scale`` that one is measured and taken, whatever the goals.

    Raises:
        RunFailed: no scale stays within bounds, or the goal is reached without the update. The
            weights are those of the start then.
    """
    scorer = Scorer.for_model(added.model)
    reference = Reference.of(added.model, retain, scorer)
    now = Reading(mean_nll(added.model, forget, scorer), 0.0)
    trials: list[dict[str, float]] = []

    def measure(alpha: float) -> Reading:
        listen({"event": "progress", "what": "scales", "done": len(trials) + 1,
                "total": EVALUATIONS if scale == "search" else 1})  # fmt: skip
        added.put(alpha)
        found = Reading(mean_nll(added.model, forget, scorer), reference.kl(added.model))
        trials.append({"scale": alpha, "forget/nll": found.nll, "retain/kl": found.kl})
        listen({"event": "trial", **trials[-1]})
        return found

    if scale != "search":
        check_scale(scale)
        taken = measure(scale)
        return FoundScale(scale, now, taken, trials, goals.missed(taken, scale))
    goal = goals.goal(now)
    if goal.nll is not None and goal.rise <= 0:
        raise RunFailed(
            f"the forget loss is {now.nll:.3f} nats per token without the update, and forget_nll "
            f"is {goal.nll:g}: there is nothing to be added",
            "raise forget_nll",
        )
    found = search(measure, now, FIRST, goal, longest=LARGEST)
    if found is None:
        added.put(0.0)
        raise RunFailed(_none_within(now, trials), "raise retain_kl or forget_nll")
    added.put(found.alpha)
    missed = goals.missed(found.reading, found.alpha)
    return FoundScale(found.alpha, now, found.reading, trials, missed)


def _none_within(now: Reading, trials: Sequence[Mapping[str, float]]) -> str:
    """Say why no scale was taken: the shortest one tried tells."""
    least = min(trials, key=lambda one: one["scale"])
    if least["forget/nll"] <= now.nll:
        why = "the update does not raise the forget loss of this model"
    else:
        why = "no scale stays within bounds"
    return (
        f"{why}: at {least['scale']:.2g}, the least of {len(trials)} tried, the forget loss is "
        f"{least['forget/nll']:.4f} (before: {now.nll:.4f}) and the KL {least['retain/kl']:.2g} "
        "nats per token"
    )


def _event(found: FoundScale, forget: Rows, retain: Rows, seconds: float) -> dict[str, Any]:
    tokens = sum(len(one.input_ids) for rows in (forget, retain) for one in rows.examples)
    return {
        "event": "step",
        "step": 1,
        "of": 1,
        "forget/nll": found.reading.nll,
        "retain/kl": found.reading.kl,
        "gain": found.reading.nll - found.start.nll,
        "kl_spent": found.reading.kl - found.start.kl,
        "alpha": found.scale,
        "evaluations": len(found.trials),
        "memory_bytes": peak_memory_bytes(),
        "seconds": round(seconds, 3),
        "tokens": tokens * (1 + len(found.trials)),
    }
