"""Clamps of several settings tried on the same rows: what each costs the retain set, and brings."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from unlearn.curvature.distance import Reference, mean_nll
from unlearn.curvature.parts import Listen
from unlearn.curvature.passes import Rows
from unlearn.errors import RunFailed, UserError
from unlearn.sae.candidates import Candidates
from unlearn.sae.clamp import Clamp, Mode
from unlearn.sae.clamped import clamped
from unlearn.scores import Scorer

Strength = float | str
"""A number in units of a dictionary's activations, or a multiple of a percentile: ``3x``."""
CONTROLS: tuple[Mode, ...] = ("zero", "random")
"""What is measured beside a clamp: the features taken away, and other directions in their place."""


@dataclass(frozen=True)
class Setting:
    """How many features of each dictionary are clamped, to what, and how rare they must be."""

    features: int
    c: Strength
    tau: float

    def __str__(self) -> str:
        return f"features {self.features}, c {self.c}, tau {self.tau:g}"


@dataclass(frozen=True)
class Measured:
    """Mean losses and KL(start || now), in nats per labelled token."""

    forget_nll: float
    retain_nll: float
    retain_kl: float

    def told(self) -> dict[str, float | None]:
        """Name the values as events do; None for what is no finite number."""
        return {
            "forget/nll": _finite(self.forget_nll),
            "retain/nll": _finite(self.retain_nll),
            "retain/kl": _finite(self.retain_kl),
        }


@dataclass(frozen=True)
class Budget:
    """What the held-out retain rows may suffer: a KL, a rise of their loss, both or neither."""

    retain_kl: float | None = None
    retain_rise: float | None = None

    def allows(self, found: Measured, start: Measured) -> bool:
        """Tell whether a measurement is a number and within."""
        if not all(map(math.isfinite, asdict(found).values())):
            return False
        kl, rise = found.retain_kl, found.retain_nll - start.retain_nll
        within_kl = self.retain_kl is None or kl <= self.retain_kl
        return within_kl and (self.retain_rise is None or rise <= self.retain_rise)

    def told(self) -> dict[str, float | None]:
        """Name the bounds as recipes do."""
        return asdict(self)


@dataclass
class Bench:
    """A model and the rows that clamps are measured on; at first it is measured as it is."""

    model: Any
    front: tuple[int, ...]
    forget: Rows
    retain: Rows

    def __post_init__(self) -> None:
        self.scorer = Scorer.for_model(self.model)
        self.reference = Reference.of(self.model, self.retain, self.scorer)
        self.start = Measured(*self._losses(), 0.0)

    def measure(self, clamps: Sequence[Clamp]) -> Measured:
        """Measure the model with clamps; they are taken out again."""
        with clamped(self.model, clamps, self.front):
            return Measured(*self._losses(), self.reference.kl(self.model))

    def _losses(self) -> tuple[float, float]:
        forget, retain = (
            mean_nll(self.model, rows, self.scorer) for rows in (self.forget, self.retain)
        )
        return forget, retain


def strength(found: Candidates, features: Sequence[int], c: Strength) -> float:
    """Give c in units of a dictionary's activations: as it is, or ``3x`` times a percentile.

    That is the 99th of the activations above 0 of these features on the forget set.

    Raises:
        UserError: they never fire there, so there is no percentile.
    """
    if not isinstance(c, str):
        return float(c)
    percentile = found.firings.percentile(features)
    if percentile is None:
        raise UserError(
            f"the features of '{found.placed.path}' do not fire on the forget set, so c={c} "
            "means nothing",
            "give c as a number",
        )
    return float(c.removesuffix("x")) * percentile


@dataclass(frozen=True)
class Trial:
    """One setting and what was measured with it."""

    setting: Setting
    found: Measured
    within: bool

    def told(self) -> dict[str, Any]:
        """Give it for events and results."""
        return {**asdict(self.setting), **self.found.told(), "within": self.within}


@dataclass
class Search:
    """Settings measured one after the other with the features that were chosen."""

    bench: Bench
    found: Sequence[Candidates]
    mode: Mode
    budget: Budget
    trials: list[Trial] = field(default_factory=list)
    asked: int = 0

    def run(self, settings: Sequence[Setting], listen: Listen) -> Trial:
        """Measure every setting, tell of each, and give the best within the budget.

        Raises:
            RunFailed: none is within.
        """
        self.asked = len(settings)
        settings = self._distinct(settings)
        for setting in settings:
            done, total = len(self.trials) + 1, len(settings)
            listen({"event": "progress", "what": "settings", "done": done, "total": total})
            measured = self.bench.measure(self.clamps(setting))
            allowed = self.budget.allows(measured, self.bench.start)
            self.trials.append(Trial(setting, measured, allowed))
            listen({"event": "trial", **self.trials[-1].told()})
        taken = best(self.trials, self.bench.start, self.budget)
        for message in self._doubts(taken):
            listen({"event": "warning", "message": message})
        return taken

    def _doubts(self, taken: Trial) -> Iterator[str]:
        setting = taken.setting
        for one in self.found:
            number = len(one.first(setting.features, setting.tau))
            if number < setting.features and None not in one.chosen:  # a person's list is as long
                few = f"only {number} of {setting.features} features of layer {one.placed.layer}"
                yield f"{few} fire on the forget set and on less than tau={setting.tau:g} of retain"
        if taken.found.forget_nll <= self.bench.start.forget_nll:
            yield "the clamps do not raise the forget loss: try another layer, or a larger c"

    def _distinct(self, settings: Sequence[Setting]) -> list[Setting]:
        """Leave out settings that clamp nothing, or the same features to the same as another."""
        found: dict[tuple[object, ...], Setting] = {}
        for setting in settings:
            features = [one.first(setting.features, setting.tau) for one in self.found]
            if all(features):
                found.setdefault((*features, setting.c), setting)
        return list(found.values())

    def clamps(self, setting: Setting, mode: Mode | None = None) -> list[Clamp]:
        """Build the clamps of a setting, one for each dictionary."""
        return [_clamp(one, setting, mode or self.mode) for one in self.found]

    def told(self, taken: Trial) -> dict[str, Any]:
        """Say what was taken, what else was tried, and what the controls come to."""
        return {
            "mode": self.mode,
            **taken.told(),
            "start": self.bench.start.told(),
            "budget": self.budget.told(),
            "settings": [trial.told() for trial in self.trials],
            "asked": self.asked,
            "controls": [self._control(taken.setting, mode) for mode in self._controls],
            "rows": {
                "forget": len(self.bench.forget.examples),
                "retain": len(self.bench.retain.examples),
            },
        }

    @property
    def _controls(self) -> tuple[Mode, ...]:
        return CONTROLS if self.mode == "clamp" else ()

    def _control(self, setting: Setting, mode: Mode) -> dict[str, Any]:
        return {"mode": mode, **self.bench.measure(self.clamps(setting, mode)).told()}


def _clamp(found: Candidates, setting: Setting, mode: Mode) -> Clamp:
    features, place = found.first(setting.features, setting.tau), found.placed
    c = 0.0 if mode == "zero" else strength(found, features, setting.c)
    return Clamp.of(place.dictionary, features, layer=place.layer, mode=mode, c=c)


def best(trials: Sequence[Trial], start: Measured, how: Budget) -> Trial:
    """Give the setting with the greatest forget loss within the budget, of equal ones the first.

    Raises:
        RunFailed: none is within; names the one that comes nearest.
    """
    within = [one for one in trials if one.within]
    if within:
        return max(within, key=lambda one: one.found.forget_nll)
    nearest = min(trials, key=lambda one: _order(one.found.retain_kl))
    rise = nearest.found.retain_nll - start.retain_nll
    bounds = ", ".join(f"{name} {bound:g}" for name, bound in how.told().items() if bound)
    bounds = bounds or "what a model can still compute"
    raise RunFailed(
        f"no setting stays within {bounds}: the nearest of {len(trials)} ({nearest.setting}) has "
        f"KL {nearest.found.retain_kl:.3g}, and the retain loss rises by {rise:.3g} nats per token",
        "try fewer features, a smaller c or tau, or raise the bound",
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _order(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def grid(
    features: int | Sequence[int], c: Strength | Sequence[Strength], tau: float | Sequence[float]
) -> list[Setting]:
    """Give every combination of values."""
    lists = (_list(features), _list(c), _list(tau))
    return [Setting(*one) for one in itertools.product(*lists)]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
