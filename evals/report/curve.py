"""The training curve: the loss of every term against the optimiser step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from unlearn.evals.report.plots import LINES, Plot, drawing, tidy, to_plot

TITLES = {
    "forget": "Forget set",
    "retain": "Retain set",
    "refusal": "Forget set, refused",
    "alternate": "Forget set, other answers",
    "retain_refusal": "Retain set, refused",
    "chosen": "Chosen answers",
    "rejected": "Rejected answers",
    "pairs": "Pairs",
    "text": "Rows trained on",
}

WATCHED = {"accuracy", "margin", "entropy", "weight_ess", "weight_max"}
"""What is no loss; a panel that shows one says at the end of each line what it is."""


def draw_curve(curve: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Draw one panel per stream, its lines labelled at their ends; None when there is no loss.

    Columns are named ``stream/objective``; steps without a finite value leave a gap.
    """
    streams = _streams(curve)
    if not streams:
        return None
    with drawing(0.5 + 1.7 * len(streams)) as figure:
        panels = figure.subplots(len(streams), 1, sharex=True, squeeze=False)[:, 0]
        colours = _colours(streams)
        for panel, (stream, names) in zip(panels, streams.items(), strict=True):
            panel.set_title(TITLES.get(stream, stream), loc="left", fontsize=10, fontweight="bold")
            _draw_panel(panel, curve, names, colours)
        panels[-1].set_xlabel("optimiser step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        return to_plot(figure, "curve", "Loss of each term by step")


def _streams(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Give the columns that hold a number, by stream; the forget stream first."""
    names = dict.fromkeys(name for entry in curve for name in entry if "/" in name)
    drawn = [name for name in names if any(map(math.isfinite, _column(curve, name)))]
    streams: dict[str, list[str]] = {}
    for name in sorted(drawn, key=lambda name: not name.startswith("forget/")):
        streams.setdefault(name.partition("/")[0], []).append(name)
    return streams


def _column(curve: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = (entry.get(name) for entry in curve)
    return [float(value) if isinstance(value, int | float) else math.nan for value in values]


def _colours(streams: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Give each objective one colour, the same in every panel."""
    objectives = dict.fromkeys(_objective(name) for names in streams.values() for name in names)
    return {name: LINES[place % len(LINES)] for place, name in enumerate(objectives)}


def _objective(column: str) -> str:
    return column.partition("/")[2]


def _draw_panel(
    panel: Axes,
    curve: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    colours: Mapping[str, str],
) -> None:
    steps = [entry["step"] for entry in curve]
    ends = []
    for name in names:
        values, colour = _column(curve, name), colours[_objective(name)]
        finite = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
        marker = "o" if len(finite) == 1 else ""
        panel.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=4)
        ends.append((finite[-1], _objective(name), colour))
    panel.set_ylabel("" if {_objective(name) for name in names} & WATCHED else "loss")
    tidy(panel)
    panel.grid(visible=False, axis="x")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=4))
    panel.margins(x=0.01, y=0.12)
    _label_ends(panel, ends)


def _label_ends(panel: Axes, ends: list[tuple[tuple[float, float], str, str]]) -> None:
    """Write each line's name at its end; names that would overlap are moved apart."""
    low, high = panel.get_ylim()
    gap = 0.13 * (high - low)
    lowest = -math.inf
    for (step, value), name, colour in sorted(ends, key=lambda end: end[0][1]):
        height = max(value, lowest + gap)
        lowest = height
        panel.annotate(
            f"{name} {value:.3g}",
            xy=(step, height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
