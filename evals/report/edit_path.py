"""The way of an edit: forget loss against the KL on retain rows, and what was predicted of it."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from unlearn.evals.report.edit_steps import EditStep
from unlearn.evals.report.labels import label_points
from unlearn.evals.report.plots import FAINT, LINES, PAPER, Plot, drawing, tidy, to_plot
from unlearn.evals.report.tradeoff import Point, mark

WIDE = 20.0
"""From this ratio of the largest to the smallest KL of a step on, its scale is logarithmic."""
NEAR = 3.0
"""A budget, or a trial, further away than this many times what was reached is not drawn."""
MEASURED, PREDICTED = LINES[0], LINES[1]
SIZE = 26
HELD_OUT = "held-out retain rows, which the curvature was not fitted to"
UNFITTED = "the retain rows, as nothing is fitted to them"
FITTED = "the retain rows, which the curvature was fitted to: they were too few to hold any out"
"""Rows on which the KL is measured."""


def draw_edit_path(steps: Sequence[EditStep], tried: Sequence[Point] = ()) -> Plot | None:
    """Draw the path, and under it the KL of each step, measured and predicted.

    ``tried``: where other scales of the step led. None when there is no step.
    """
    if not steps:
        return None
    compared = [one for one in steps if one.predicted_kl is not None]
    with drawing(5.4 if compared else 3.4) as figure:
        ratios = [1.6, 1.0] if compared else [1.0]
        panels = figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
        figure.set_layout_engine("constrained", hspace=0.09)
        if compared:
            _draw_compared(panels[1], compared)
        places = _draw_path(panels[0], steps, near(steps, tried))
        label_points(figure, panels[0], places, _along(steps))
        return to_plot(figure, "edit-path", "Forget loss and KL on retain rows by step")


def budget_drawn(steps: Sequence[EditStep]) -> bool:
    """Tell whether the line of the budget lies near enough to be drawn."""
    budget = steps[-1].budget
    return budget is not None and budget <= NEAR * max(one.kl for one in steps)


def near(steps: Sequence[EditStep], tried: Sequence[Point]) -> list[Point]:
    """Leave out trials that went so far that the path would no longer be seen beside them."""
    begin = steps[0].nll if steps[0].nll_from is None else steps[0].nll_from
    wide = max(abs(one.nll - begin) for one in steps)
    high = max(one.kl for one in steps)
    return [one for one in tried if abs(one.x - begin) <= NEAR * wide and one.y <= NEAR * high]


def _draw_path(axes: Axes, steps: Sequence[EditStep], tried: Sequence[Point]) -> list[Point]:
    """Draw start, steps, corrections and budget; give the points that are to be labelled."""
    title = "Scales of the update" if tried else "After each step"
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("forget loss, nats per token")
    axes.set_ylabel("KL on retain rows")
    tidy(axes)
    axes.plot([one.x for one in tried], [one.y for one in tried], "o", color=FAINT, markersize=3.5)
    places = []
    for before, one in zip([None, *steps], steps, strict=False):
        if one.nll_from is not None:
            _line(axes, (one.nll_from, one.kl_from), (one.nll, one.kl))
            if before is None:
                places.append(Point(one.nll_from, one.kl_from, "start"))
                mark(axes, places[0], fill=PAPER, edge=MEASURED)
            elif one.taken_back:
                _line(axes, (before.nll, before.kl), (one.nll_from, one.kl_from), dashed=True)
        label = f"{one.alpha:.3g}, taken" if tried and one.alpha is not None else str(one.step)
        places.append(Point(one.nll, one.kl, label))
        mark(axes, places[-1], fill=MEASURED, edge=MEASURED, size=SIZE)
    axes.margins(x=0.08, y=0.16)
    axes.set_ylim(bottom=min(0.0, *(one.y for one in places)))
    _draw_budget(axes, steps)
    return [*places, *tried]


def _along(steps: Sequence[EditStep]) -> list[Point]:
    """Give points on the lines that are drawn, for labels to keep away from."""
    return [
        Point(one.nll_from + part * (one.nll - one.nll_from), one.kl_from + part * one.spent)
        for one in steps
        if one.nll_from is not None
        for part in (0.08, 0.2, 0.4, 0.6, 0.8, 0.92)
    ]


def _line(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], *, dashed: bool = False
) -> None:
    style = (0, (2, 1.5)) if dashed else "-"
    axes.plot(*zip(begin, end, strict=True), color=MEASURED, linewidth=1.4, linestyle=style)


def _draw_budget(axes: Axes, steps: Sequence[EditStep]) -> None:
    """Draw the budget across, or say that it lies above what is drawn."""
    budget = steps[-1].budget
    if budget is None:
        return
    drawn = budget_drawn(steps)
    if drawn:
        axes.set_ylim(top=max(axes.get_ylim()[1], 1.1 * budget))
        axes.axhline(budget, color=FAINT, linewidth=1.2, linestyle=(0, (6, 3)))
    axes.annotate(
        f"budget {budget:g}" if drawn else f"↑ budget {budget:g}, above this picture",
        xy=(0.012, budget if drawn else axes.get_ylim()[1]),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        va="top",
    )


def _draw_compared(axes: Axes, steps: Sequence[EditStep]) -> None:
    """Draw the KL of every step by itself: measured, and as the curvature predicted it."""
    axes.set_title("KL of each step alone", loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("KL on retain rows")
    tidy(axes)
    pairs = [(one.step, one.spent, one.predicted_kl or 0.0) for one in steps]
    values = [value for _, *pair in pairs for value in pair if value > 0]
    log = bool(values) and max(values) / min(values) >= WIDE
    if log:
        _make_log(axes, min(values), max(values))
    for step, spent, predicted in pairs:
        axes.plot((step, step), (predicted, spent), color=PREDICTED, linewidth=1.1, linestyle=":")
        for value, fill, edge, marker in (
            (spent, MEASURED, MEASURED, "o"),
            (predicted, PAPER, PREDICTED, "D"),
        ):
            if value > 0 or not log:  # a step that lowered the KL has no place on such a scale
                mark(axes, Point(step, value), fill=fill, edge=edge, marker=marker, size=SIZE)
    for name, value in zip(("measured", "predicted"), pairs[0][1:], strict=True):
        if value > 0 or not log:
            axes.annotate(
                name, (pairs[0][0], value), (8, 0), textcoords="offset points", va="center"
            )
    axes.set_xlim(steps[0].step - 0.5, steps[-1].step + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.grid(visible=False, axis="x")


def _make_log(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low / 3, 3 * high)
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-"))
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def caption(steps: Sequence[EditStep], tried: Sequence[Point] = (), rows: str = HELD_OUT) -> str:
    """Say what the picture shows: what was measured, what was predicted, and on which rows."""
    text = (
        "Filled points are measured: the mean loss of the forget rows, and KL(model before the "
        f"edit ‖ after) on {rows}; in nats per token."
    )
    if steps[0].nll_from is not None:
        text += " Hollow circle: the start."
    if any(one.taken_back for one in steps):
        text += " Dashed: the correction before a step, which takes KL back."
    if near(steps, tried):
        text += " Small points: scales that were tried and not taken."
    if budget_drawn(steps):
        text += " Line across: the budget."
    if any(one.predicted_kl is not None for one in steps):
        text += (
            " Diamonds are predicted, by the curvature of the rows it was fitted to: how much the "
            "step would raise the KL; the point above or below is how much it did."
        )
    return text
