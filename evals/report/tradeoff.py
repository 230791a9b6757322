"""The way of a run between forgetting and utility, step by step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from unlearn.evals.report.labels import label_points
from unlearn.evals.report.plots import INK, LINES, PAPER, Plot, drawing, tidy, to_plot
from unlearn.evals.report.table import finite

FORGETTING = (
    "forget_quality_log10_p",
    "forget_Q_A_Prob",
    "extraction_strength",
    "forget_extraction_strength",
    "forget_Q_A_ROUGE",
    "wmdp/acc",
    "wmdp_bio/acc",
    "wmdp_cyber/acc",
    "wmdp_chem/acc",
)
UTILITY = ("model_utility", "retain_Q_A_Prob", "retain_Q_A_ROUGE", "mmlu/acc")
"""Which metric stands for each axis: the first that everything to be compared has."""

LABELLED = 8
"""Steps that get a label; a longer path labels some of them, evenly."""


@dataclass(frozen=True)
class Axis:
    """A metric and what is wanted of it: ``lower`` or ``higher``."""

    metric: str
    direction: str

    @property
    def label(self) -> str:
        return f"{self.metric} ({self.direction} is wanted →)"


@dataclass(frozen=True)
class Point:
    """A place in the plot: forgetting, utility, and what to write beside it."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Path:
    """The measured steps of a run in order, and the models they are compared with."""

    x: Axis
    y: Axis
    start: Point | None
    steps: list[Point]
    selected: int | None
    retain_model: Point | None


def choose_axes(
    has: Callable[[str], bool],
    directions: Mapping[str, str],
    x: str | None = None,
    y: str | None = None,
) -> tuple[Axis, Axis] | None:
    """Choose the metric of each axis: the one given, else the first declared one that is had."""
    forgetting = [x] if x else FORGETTING
    utility = [y] if y else UTILITY
    first = next((name for name in forgetting if has(name)), None)
    second = next((name for name in utility if has(name)), None)
    if first is None or second is None:
        return None
    return Axis(first, directions.get(first, "none")), Axis(second, directions.get(second, "none"))


def path_of(results: Mapping[str, Any], directions: Mapping[str, str]) -> Path | None:
    """Find the path of a run; None when fewer than two places are known or no metric fits."""
    steps = results.get("steps") or []
    axes = choose_axes(
        lambda name: any(finite(step["metrics"].get(name)) is not None for step in steps),
        directions,
    )
    if axes is None:
        return None
    metrics = results.get("metrics", {})
    places = {step["step"]: _point(step["metrics"], axes, str(step["step"])) for step in steps}
    known = {step: place for step, place in sorted(places.items()) if place}
    start = known.pop(0, None) or _point(metrics.get("before", {}), axes, "start")
    if len(known) + (start is not None) < 2:
        return None
    chosen = (results.get("selected") or {}).get("step")
    return Path(
        *axes,
        start,
        list(known.values()),
        list(known).index(chosen) if chosen in known else None,
        _point(metrics.get("retain_model", {}), axes, "retain model"),
    )


def _point(metrics: Mapping[str, Any], axes: tuple[Axis, Axis], label: str) -> Point | None:
    x, y = (finite(metrics.get(axis.metric)) for axis in axes)
    return None if x is None or y is None else Point(x, y, label)


def draw_tradeoff(path: Path) -> Plot:
    """Draw the path; up and to the right is better, whatever the directions of the metrics."""
    with drawing(3.6) as figure:
        axes = figure.subplots()
        way = ([path.start] if path.start else []) + path.steps
        axes.plot([p.x for p in way], [p.y for p in way], color=LINES[0], linewidth=1.2, alpha=0.6)
        axes.scatter([p.x for p in path.steps], [p.y for p in path.steps], s=18, color=LINES[0])
        if path.start:
            mark(axes, path.start, fill=PAPER, edge=LINES[0])
        if path.selected is not None:
            mark(axes, path.steps[path.selected], fill="none", edge=INK, size=110)
        if path.retain_model:
            mark(axes, path.retain_model, fill=LINES[1], edge=LINES[1], marker="D")
        axes.margins(0.12)
        finish(axes, path.x, path.y)
        fixed = [point for point in (path.retain_model, path.start) if point]
        label_points(figure, axes, fixed + _some(path.steps, path.selected), way)
        return to_plot(figure, "trade-off", "Forgetting and utility by step")


def finish(axes: Axes, x: Axis, y: Axis) -> None:
    """Name the axes, and turn those of which less is wanted."""
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    if x.direction == "lower":
        axes.invert_xaxis()
    if y.direction == "lower":
        axes.invert_yaxis()
    tidy(axes)


def _some(steps: Sequence[Point], selected: int | None) -> list[Point]:
    """Choose the steps to label: the selected one, the last one, and others evenly spread."""
    stride = max(1, -(-len(steps) // LABELLED))
    places = [place for place in range(len(steps) - 1, -1, -stride) if place != selected]
    points = [steps[place] for place in places]
    if selected is None:
        return points
    chosen = steps[selected]
    return [Point(chosen.x, chosen.y, f"{chosen.label}, selected"), *points]


def mark(
    axes: Axes, point: Point, *, fill: str, edge: str, marker: str = "o", size: float = 44
) -> None:
    """Put a symbol on a point."""
    axes.scatter(
        [point.x], [point.y], marker=marker, s=size, facecolors=fill, edgecolors=edge,
        linewidths=1.6, zorder=3, clip_on=False,
    )  # fmt: skip
