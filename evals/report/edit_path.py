"""The way of an edit: forget loss against the KL on retain rows, measured and predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from unlearn.evals.report.edit_steps import EditStep
from unlearn.evals.report.labels import label_points
from unlearn.evals.report.plots import FAINT, LINES, PAPER, Plot, drawing, tidy, to_plot
from unlearn.evals.report.tradeoff import Point, mark

WIDE = 20.0
"""From this ratio of the largest to the smallest KL on, the scale is logarithmic."""
DEPTH = 1e-6
"""A logarithmic scale ends at this share of its top: what is less lies on its lower edge."""
NEAR = {False: 2.5, True: 30.0}
"""How many times the largest KL a budget may be for its line to be drawn: linear, logarithmic."""


@dataclass(frozen=True)
class Scale:
    """The vertical scale of a picture, and the budget where its line lies within."""

    low: float
    high: float
    log: bool
    budget: float | None

    def height(self, kl: float) -> float:
        """Give where a KL is drawn: 0 has no place on a logarithmic scale but its lower edge."""
        return max(kl, self.low) if self.log else kl


def scale_of(values: Sequence[float], budget: float | None = None) -> Scale:
    """Choose a scale that shows all positive values, logarithmic where they are far apart."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    log = high / low >= WIDE
    drawn = budget if budget and budget <= NEAR[log] * high else None
    high = max(high, drawn or 0.0)
    if log:
        return Scale(max(low / 2.5, DEPTH * high), 2.0 * high, log, drawn)
    return Scale(min(0.0, *values), 1.15 * high, log, drawn)


def scale_for(steps: Sequence[EditStep], tried: Sequence[Point] = ()) -> Scale:
    """Choose the scale for everything that is drawn."""
    values = [kl for one in steps for kl in (one.kl, one.kl_from, one.expected_kl or 0.0)]
    return scale_of([*values, *(one.y for one in tried)], steps[-1].budget)


def draw_edit_path(steps: Sequence[EditStep], tried: Sequence[Point] = ()) -> Plot | None:
    """Draw the path from step to step; None when there is no step.

    The KL that was predicted for a step stands at its measured loss: a predicted gain can lie far
    outside of the picture where the forget set was memorised. ``tried``: other scales of a step.
    """
    if not steps:
        return None
    scale = scale_for(steps, tried)
    with drawing(3.7) as figure:
        axes = figure.subplots()
        if scale.log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(scale.low, scale.high)
        for one in tried:
            axes.plot(one.x, scale.height(one.y), "o", color=FAINT, markersize=3.5)
        places = _draw_steps(axes, steps, scale)
        axes.margins(x=0.08)
        _draw_budget(axes, steps[-1].budget, scale)
        axes.set_xlabel("forget loss, nats per token")
        axes.set_ylabel("KL on retain rows, nats per token")
        tidy(axes)
        label_points(figure, axes, places, places)
        return to_plot(figure, "edit-path", "Forget loss and KL on retain rows by step")


def _draw_steps(axes: Axes, steps: Sequence[EditStep], scale: Scale) -> list[Point]:
    """Draw start, steps, corrections and predictions; give the points that are to be labelled."""
    colour, other = LINES[0], LINES[1]
    places = []
    before: EditStep | None = None
    for one in steps:
        top = scale.height(one.kl)
        if one.nll_from is not None:
            begun = one.nll_from, scale.height(one.kl_from)
            axes.plot(*zip(begun, (one.nll, top), strict=True), color=colour, linewidth=1.4)
            if before is None:
                mark(axes, start := Point(*begun, "start"), fill=PAPER, edge=colour)
                places.append(start)
            elif one.taken_back:
                left = before.nll, scale.height(before.kl)
                axes.plot(
                    *zip(left, begun, strict=True), color=colour, linewidth=1.2, ls=(0, (2, 1.5))
                )
        if one.expected_kl is not None:
            expected = scale.height(one.expected_kl)
            axes.plot((one.nll, one.nll), (expected, top), color=other, linewidth=1.1, ls=":")
            mark(axes, Point(one.nll, expected), fill=PAPER, edge=other, marker="D", size=26)
        mark(axes, place := Point(one.nll, top, str(one.step)), fill=colour, edge=colour, size=26)
        places.append(place)
        before = one
    return places


def _draw_budget(axes: Axes, budget: float | None, scale: Scale) -> None:
    """Draw the budget across, or say that it lies above what is drawn."""
    if not budget:
        return
    text, height = f"budget {budget:g}", scale.high
    if scale.budget:
        height = scale.budget
        axes.axhline(height, color=FAINT, linewidth=1.2, linestyle=(0, (6, 3)))
    else:
        text = f"↑ {text}, above this picture"
    axes.annotate(
        text, xy=(0.01, height), xycoords=("axes fraction", "data"), xytext=(0, -3),
        textcoords="offset points", va="top",
    )  # fmt: skip


def caption(
    steps: Sequence[EditStep], tried: Sequence[Point] = (), *, held_out: bool = True
) -> str:
    """Say what the picture shows: what was measured and what predicted, and on which rows."""
    scale = scale_for(steps, tried)
    rows = "retain rows that the curvature was not fitted to" if held_out else "the retain rows"
    text = (
        "Filled points: measured after each step, the mean loss of the forget rows and "
        f"KL(model before the edit ‖ after) on {rows}."
    )
    if steps[0].nll_from is not None:
        text += " Hollow circle: the start, whose KL is 0"
        text += "; a logarithmic scale has it on its lower edge." if scale.log else "."
    if any(one.taken_back is not None for one in steps):
        text += " Dashed: the correction before a step, which takes KL back."
    if any(one.predicted_kl is not None for one in steps):
        text += (
            " Diamonds: the KL as it would be had the step raised it by what the fitted curvature "
            "predicted; the dotted line from there to the point is what the prediction missed."
        )
    if tried:
        text += " Small points: scales that were tried and not taken."
    if scale.budget:
        text += " Line across: the budget."
    return text
