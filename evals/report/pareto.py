"""The Pareto front: what no other run beats in forgetting and utility at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from unlearn.evals.report.labels import label_points
from unlearn.evals.report.plots import FAINT, LINES, PAPER, Plot, drawing, to_plot
from unlearn.evals.report.table import number
from unlearn.evals.report.tradeoff import Axis, Point, finish, mark

Bounds = tuple[float, float] | None
Frame = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Ranked:
    """A row of the leaderboard in the plot; the bounds are those of the interval over seeds."""

    point: Point
    front: bool
    x_bounds: Bounds = None
    y_bounds: Bounds = None


def pareto_front(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[bool]:
    """Say for every point whether it lies on the front: whether no other point dominates it.

    A point dominates another when it is at least as good in every coordinate and better in one;
    ``directions`` says per coordinate whether ``higher`` or ``lower`` is better. Equal points do
    not dominate each other. A point with a NaN is never on the front and dominates nothing.
    """
    signs = [-1.0 if direction == "lower" else 1.0 for direction in directions]
    turned = [[sign * value for sign, value in zip(signs, p, strict=True)] for p in points]
    usable = [not any(map(math.isnan, point)) for point in turned]
    rivals = [point for point, use in zip(turned, usable, strict=True) if use]
    return [
        use and not any(_dominates(rival, point) for rival in rivals)
        for point, use in zip(turned, usable, strict=True)
    ]


def _dominates(rival: Sequence[float], point: Sequence[float]) -> bool:
    pairs = list(zip(rival, point, strict=True))
    return all(theirs >= ours for theirs, ours in pairs) and any(a > b for a, b in pairs)


def draw_front(
    ranked: Sequence[Ranked], references: Mapping[str, Sequence[Point]], x: Axis, y: Axis
) -> Plot:
    """Draw the leaderboard: filled points are the front, up and to the right is better.

    ``references`` holds points under ``before`` (starting models) and ``retain_model``.
    """
    with drawing(3.9) as figure:
        axes = figure.subplots()
        retain = list(references.get("retain_model", ()))
        frame = _frame([row.point for row in ranked] + retain)
        starts = [_at_edge(point, frame) for point in references.get("before", ())]
        _staircase(axes, [row.point for row in ranked if row.front], x, y)
        for row in ranked:
            _bars(axes, row)
            mark(axes, row.point, fill=LINES[0] if row.front else PAPER, edge=LINES[0])
        for point in starts:
            mark(axes, point, fill=PAPER, edge=FAINT, marker="s")
        for point in retain:
            mark(axes, point, fill=LINES[1], edge=LINES[1], marker="D")
        axes.set(xlim=frame[0], ylim=frame[1])
        finish(axes, x, y)
        label_points(figure, axes, [row.point for row in ranked] + retain + starts)
        return to_plot(figure, "pareto-front", "Forgetting and utility of each run, and the front")


def _frame(points: Sequence[Point]) -> Frame:
    """Give the limits of both axes; the bars of few seeds may be much longer and are cut."""
    found = []
    for values in ([p.x for p in points], [p.y for p in points]):
        low, high = min(values), max(values)
        room = 0.12 * (high - low) or 0.05 * abs(high) or 0.05
        found.append((low - room, high + room))
    return found[0], found[1]


def _at_edge(point: Point, frame: Frame) -> Point:
    """Move a starting model that lies far outside the frame to its edge, and say where it is.

    Framing it too would press the runs together in a corner.
    """
    (left, right), (low, high) = frame
    x, y = min(max(point.x, left), right), min(max(point.y, low), high)
    if (x, y) == (point.x, point.y):
        return point
    place = f"{number(point.x)}, {number(point.y)}"
    return Point(x, y, f"{point.label}, beyond at ({place})")


def _staircase(axes: Axes, front: Sequence[Point], x: Axis, y: Axis) -> None:
    """Draw the edge of what the front dominates."""
    worst_first = sorted(front, key=lambda p: -p.x if x.direction == "lower" else p.x)
    corners: list[tuple[float, float]] = []
    for point in worst_first:
        if corners:
            corners.append((corners[-1][0], point.y))
        corners.append((point.x, point.y))
    if len(corners) > 1:
        axes.plot(*zip(*corners, strict=True), color=LINES[0], linewidth=1.1, alpha=0.5)


def _bars(axes: Axes, row: Ranked) -> None:
    for bounds, vertical in ((row.x_bounds, False), (row.y_bounds, True)):
        if bounds is None:
            continue
        xs, ys = ([row.point.x] * 2, bounds) if vertical else (bounds, [row.point.y] * 2)
        axes.plot(xs, ys, color=LINES[0], linewidth=1, alpha=0.45, zorder=1)
