"""The steps of an edit: what each was to change, what it has changed, and what it cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unlearn.evals.report.table import finite
from unlearn.evals.report.tradeoff import Point

NONE = "–"


@dataclass(frozen=True)
class EditStep:
    """One step; losses and KL in nats per token, None where it was not recorded.

    ``nll_from`` and ``kl_from`` are what the step began with: after some KL was ``taken_back``,
    where there is a correction. ``budget`` is the KL that all steps together may come to.
    """

    step: int
    nll_from: float | None
    nll: float
    predicted_gain: float | None
    kl_from: float
    kl: float
    predicted_kl: float | None
    taken_back: float | None
    budget: float | None
    alpha: float | None
    damping: float | None
    trials: int | None
    seconds: float | None

    @property
    def gain(self) -> float | None:
        """Measured rise of the forget loss."""
        return None if self.nll_from is None else self.nll - self.nll_from

    @property
    def spent(self) -> float:
        """Measured rise of the KL."""
        return self.kl - self.kl_from

    def share(self, kl: float) -> float | None:
        """Give a KL as a share of the budget."""
        return kl / self.budget if self.budget else None


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading in two parts, and how its cells are written."""

    group: str
    title: str
    text: Callable[[EditStep], str]


def three(value: float | None) -> str:
    """Write a number with three significant digits; a dash for none."""
    if value is None:
        return NONE
    if 0 < abs(value) < 0.001:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g} %"


def _way(one: EditStep) -> str:
    return three(one.nll) if one.nll_from is None else f"{three(one.nll_from)} → {three(one.nll)}"


COLUMNS = (
    Column("", "Step", lambda one: str(one.step)),
    Column("Forget loss", "from → to", _way),
    Column("Gain", "predicted", lambda one: three(one.predicted_gain)),
    Column("Gain", "measured", lambda one: three(one.gain)),
    Column("Retain KL", "taken back", lambda one: three(one.taken_back)),
    Column("Retain KL", "predicted", lambda one: three(one.predicted_kl)),
    Column("Retain KL", "spent", lambda one: three(one.spent)),
    Column("Retain KL", "after", lambda one: three(one.kl)),
    Column("Of the budget", "step", lambda one: _percent(one.share(one.spent))),
    Column("Of the budget", "all", lambda one: _percent(one.share(one.kl))),
    Column("Search", "α", lambda one: three(one.alpha)),
    Column("Search", "λ", lambda one: three(one.damping)),
    Column("Search", "trials", lambda one: NONE if one.trials is None else str(one.trials)),
    Column("Search", "seconds", lambda one: NONE if one.seconds is None else f"{one.seconds:.1f}"),
)


def edit_steps(training: Mapping[str, Any]) -> list[EditStep]:
    """Read the steps of a training summary; an entry without both measurements is left out."""
    start = training.get("start") or {}
    nll, kl = finite(start.get("forget/nll")), finite(start.get("retain/kl")) or 0.0
    curve = training.get("curve") or []
    known = training.get("step_seconds") or []
    seconds = known if len(known) == len(curve) else [None] * len(curve)
    found = []
    for entry, took in zip(curve, seconds, strict=True):
        one = _step(entry, nll, kl, finite(took))
        if one is not None:
            found.append(one)
            nll, kl = one.nll, one.kl
    return found


def _step(
    entry: Mapping[str, Any], nll: float | None, kl: float, seconds: float | None
) -> EditStep | None:
    """Read one entry; ``nll`` and ``kl`` are those after the step before."""
    known = {name: finite(value) for name, value in entry.items()}
    nll_after, kl_after = known.get("forget/nll"), known.get("retain/kl")
    if nll_after is None or kl_after is None:
        return None
    gain, corrected = known.get("gain"), known.get("corrected_kl")
    back = kl - corrected if known.get("correction") and corrected is not None else None
    damping = entry.get("damping")
    return EditStep(
        step=entry["step"],
        nll_from=nll if gain is None else nll_after - gain,
        nll=nll_after,
        predicted_gain=known.get("predicted_gain"),
        kl_from=kl if corrected is None else corrected,
        kl=kl_after,
        predicted_kl=known.get("predicted_kl"),
        taken_back=back,
        budget=known.get("kl_budget"),
        alpha=known.get("alpha"),
        damping=finite(damping[1]) if isinstance(damping, Sequence) and damping[1:] else None,
        trials=entry.get("evaluations"),
        seconds=seconds,
    )


def describe_edit(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give the steps of an edit as values and as a table; None where nothing was edited."""
    if not training.get("edit"):
        return None
    steps = edit_steps(training)
    columns = [one for one in COLUMNS if any(one.text(step) != NONE for step in steps)]
    firsts = {one.group: one for one in reversed(columns)}
    return {
        "name": str(training["edit"]),
        "steps": [
            asdict(one) | {"gain": one.gain, "spent": one.spent, "budget_share": one.share(one.kl)}
            for one in steps
        ],
        "columns": [
            {"group": one.group, "title": one.title, "begins": one is firsts[one.group]}
            for one in columns
        ],
        "groups": _groups(columns),
        "rows": [[one.text(step) for one in columns] for step in steps],
        "note": _note(steps) if steps else "",
        "trials": _trials(training),
    }


def _groups(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Give the headings above the headings, and how many columns each is above."""
    widths: dict[str, int] = {}
    for one in columns:
        widths[one.group] = widths.get(one.group, 0) + 1
    return [{"title": group, "columns": width} for group, width in widths.items()]


def _trials(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give what was measured at every scale of an update, from none of it on."""
    tried = training.get("trials") or []
    start = [{"scale": 0.0, **training["start"]}] if tried and training.get("start") else []
    found = []
    for one in sorted([*start, *tried], key=lambda one: one["scale"]):
        nll, kl = three(finite(one.get("forget/nll"))), three(finite(one.get("retain/kl")))
        taken = one["scale"] == training.get("scale")
        scale = f"{one['scale']:.4g}"
        found.append({"scale": scale, "forget_nll": nll, "retain_kl": kl, "taken": taken})
    return found


def tried_scales(training: Mapping[str, Any]) -> list[Point]:
    """Give where the scales led that were tried and not taken."""
    return [
        Point(one["forget/nll"], one["retain/kl"], f"{one['scale']:.3g}")
        for one in training.get("trials") or []
        if one["scale"] != training.get("scale")
        and finite(one.get("forget/nll")) is not None
        and finite(one.get("retain/kl")) is not None
    ]


def _note(steps: Sequence[EditStep]) -> str:
    """Say what the columns of the table are."""
    last = steps[-1]
    text = "Losses and KL in nats per token. "
    if last.predicted_kl is not None or last.predicted_gain is not None:
        text += (
            "Predicted: the gain to first order, by the gradient of what the edit raises; the KL "
            "to second order, by the curvature of the rows it was fitted to. The rest is measured. "
        )
    text += "Spent: how much this step has raised the KL. "
    if any(one.taken_back is not None for one in steps):
        text += (
            "Taken back: how much a correction lowered the KL before the step, which then begins "
            "from there. "
        )
    if last.budget:
        text += f"The budget, for all steps together, is a KL of {last.budget:g}. "
    if last.damping is not None:
        text += "λ: the damping, median over the layers. "
    return f"{text}α: the scale of the step; trials: how many scales were measured to choose it."
