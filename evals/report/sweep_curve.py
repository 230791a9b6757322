"""Metrics of a sweep against one of its settings: a line per recipe, a band over the seeds."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from unlearn.evals.report.plots import FAINT, LINES, Plot, drawing, tidy, to_plot
from unlearn.evals.report.table import finite

DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDE = 8.0
"""From this ratio of the largest to the smallest setting on, the scale is logarithmic."""
REFERENCES = {"before": "starting model", "retain_model": "retain model"}


@dataclass(frozen=True)
class Place:
    """One setting of one line: the mean over the seeds, and the lowest and highest of them."""

    x: float
    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Measured:
    """One finished run: its line, its setting, and what was measured."""

    line: str
    x: float
    metrics: Mapping[str, Any]


def lines_of(runs: Sequence[Measured], metric: str) -> dict[str, list[Place]]:
    """Give the places of every line, by rising setting; runs without the metric are left out."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        value = finite(run.metrics.get(metric))
        if value is not None:
            found.setdefault(run.line, {}).setdefault(run.x, []).append(value)
    return {
        line: [
            Place(x, statistics.fmean(values), min(values), max(values), len(values))
            for x, values in sorted(places.items())
        ]
        for line, places in found.items()
    }


def curve_of(
    runs: Sequence[Measured],
    setting: str,
    metrics: Sequence[str],
    references: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Give everything the drawing shows, as plain values."""
    panels = []
    for metric in metrics:
        lines = lines_of(runs, metric)
        known = {who: finite(values.get(metric)) for who, values in references.items()}
        levels = {who: value for who, value in known.items() if value is not None}
        if lines:
            places = {line: [asdict(place) for place in found] for line, found in lines.items()}
            panels.append({"metric": metric, "lines": places, "references": levels})
    return {"setting": setting, "panels": panels}


def draw_sweep_curve(
    curve: Mapping[str, Any], titles: Mapping[str, str], directions: Mapping[str, str]
) -> tuple[Plot, bytes]:
    """Draw one panel per metric, one line per recipe; give the SVG and a PNG."""
    panels = curve["panels"]
    with drawing(0.9 + 2.1 * len(panels), width=6.2) as figure:
        drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        names = list(dict.fromkeys(line for panel in panels for line in panel["lines"]))
        for axes, panel in zip(drawn, panels, strict=True):
            metric = panel["metric"]
            wanted = directions.get(metric, "none")
            arrow = {"lower": " (lower is wanted)", "higher": " (higher is wanted)"}.get(wanted, "")
            axes.set_title(
                f"{titles.get(metric, metric)}{arrow}", loc="left", fontsize=10, fontweight="bold"
            )
            _panel(axes, panel, names)
        _scale(drawn[-1], curve)
        drawn[-1].set_xlabel(_words(curve["setting"]))
        _legend(figure, drawn[0], len(names))
        plot = to_plot(figure, "sweep-curve", f"Metrics against {curve['setting']}")
        return plot, _png(figure)


def _panel(axes: Axes, panel: Mapping[str, Any], names: Sequence[str]) -> None:
    for name, places in panel["lines"].items():
        place = names.index(name)
        colour = LINES[place % len(LINES)]
        xs = [one["x"] for one in places]
        if any(one["n"] > 1 for one in places):
            lows, highs = [one["low"] for one in places], [one["high"] for one in places]
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.14, linewidth=0)
        axes.plot(
            xs,
            [one["mean"] for one in places],
            color=colour,
            linestyle=DASHES[place // len(LINES) % len(DASHES)],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4.5,
            linewidth=1.5,
            label=name,
        )
    for value in panel["references"].values():
        axes.axhline(value, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.margins(x=0.03, y=0.12)
    tidy(axes)
    _name_levels(axes, panel["references"])


def _name_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    """Write beside each level which model it is; names that would overlap are moved apart."""
    low, high = axes.get_ylim()
    lowest = -math.inf
    for who, value in sorted(levels.items(), key=lambda level: level[1]):
        height = max(value, lowest + 0.1 * (high - low))
        lowest = height
        axes.annotate(
            REFERENCES.get(who, who),
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=FAINT,
            annotation_clip=False,
        )


def _scale(axes: Axes, curve: Mapping[str, Any]) -> None:
    """Mark the settings that were run, and nothing else."""
    xs = sorted(
        {p["x"] for panel in curve["panels"] for line in panel["lines"].values() for p in line}
    )
    if xs[0] > 0 and xs[-1] / xs[0] >= WIDE:
        axes.set_xscale("log")
    axes.set_xticks(xs)
    share = curve["setting"].endswith("fraction")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{100 * x:.3g} %" if share else f"{x:.3g}")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _words(setting: str) -> str:
    if setting == "data.select.fraction":
        return "part of the forget set that is trained on (data.select.fraction)"
    return setting


def _legend(figure: Figure, axes: Axes, lines: int) -> None:
    if lines < 2:
        return
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(lines, 4))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def is_number(text: str) -> bool:
    """Tell whether a setting can be an axis."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
