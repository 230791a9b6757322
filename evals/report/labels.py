"""Labels of points in a plot, placed so that none covers another or a point."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unlearn.evals.report.plots import FAINT

SIZE = 9.0
WIDE, HIGH = 0.6, 1.15
"""Points of type, and the mean width and height of a character as shares of it."""

OFFSETS = (
    *((6, 8), (-6, 8), (6, -8), (-6, -8), (8, 0), (-8, 0), (0, 11), (0, -11)),
    *((9, 17), (-9, 17), (9, -17), (-9, -17), (0, 22), (0, -22), (24, 12), (-24, 12), (24, -12)),
    *((-24, -12), (16, 27), (-16, 27), (16, -27), (-16, -27), (40, 20), (-40, 20), (40, -20)),
)
"""Where a label may stand relative to its point, in typographic points, best first."""

FAR = 15.0
"""A label further away than this is joined to its point by a line."""


class Labelled(Protocol):
    """A place in data coordinates and its label."""

    @property
    def x(self) -> float: ...

    @property
    def y(self) -> float: ...

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Box:
    """A rectangle in typographic points."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: "Box") -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def within(self, other: "Box") -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.bottom >= other.bottom
            and self.top <= other.top
        )


def place_labels(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    obstacles: Sequence[tuple[float, float]],
    frame: Box,
) -> list[tuple[float, float] | None]:
    """Choose an offset for each label, in the order given; None where it fits nowhere.

    All lengths in typographic points. A label covers no point, no obstacle and no earlier label,
    and stays inside the frame.
    """
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in (*points, *obstacles)]
    found: list[tuple[float, float] | None] = []
    for (x, y), label in zip(points, labels, strict=True):
        fits = (
            (offset, box)
            for offset, box in _boxes(x, y, label)
            if box.within(frame) and not any(box.meets(other) for other in taken)
        )
        offset, box = next(fits, (None, None))
        found.append(offset)
        if box:
            taken.append(box)
    return found


def _boxes(x: float, y: float, label: str) -> Iterator[tuple[tuple[float, float], Box]]:
    wide, high = WIDE * SIZE * len(label), HIGH * SIZE
    for dx, dy in OFFSETS:
        left = x + dx - (0 if dx > 0 else wide if dx < 0 else wide / 2)
        yield (dx, dy), Box(left, y + dy - high / 2, left + wide, y + dy + high / 2)


def label_points(
    figure: Figure, axes: Axes, points: Sequence[Labelled], obstacles: Sequence[Labelled] = ()
) -> None:
    """Write each label beside its point, important ones first; what fits nowhere is left out."""
    figure.draw_without_rendering()  # settles the layout, and with it where points lie
    scale = 72 / figure.dpi

    def on_paper(point: Labelled) -> tuple[float, float]:
        x, y = axes.transData.transform((point.x, point.y)) * scale
        return float(x), float(y)

    inside = axes.get_window_extent()
    frame = Box(inside.x0 * scale, inside.y0 * scale, inside.x1 * scale, inside.y1 * scale)
    offsets = place_labels(
        [on_paper(point) for point in points],
        [point.label for point in points],
        [on_paper(point) for point in obstacles],
        frame,
    )
    for point, offset in zip(points, offsets, strict=True):
        if offset:
            _write(axes, point, offset)


def _write(axes: Axes, point: Labelled, offset: tuple[float, float]) -> None:
    dx, dy = offset
    line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5}
    axes.annotate(
        point.label,
        xy=(point.x, point.y),
        xytext=offset,
        textcoords="offset points",
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="center",
        fontsize=SIZE,
        arrowprops=line if max(abs(dx), abs(dy)) > FAR else None,
    )
