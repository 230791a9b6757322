"""Eigenvalues against their rank, one panel per kind of layer and factor, one line per block."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from unlearn.curvature.damping import Damping
from unlearn.evals.report.plots import FAINT, INK, LINES, Plot, drawing, tidy, to_plot

LOWEST = 1e-9
"""Eigenvalues below this share of the mean are not drawn: in float32 they are rounding."""
TITLES = {
    "A": "A, inputs",
    "G": "G, gradients at outputs",
    "H": "H, the block itself",
}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PANEL = 1.35
"""Inches of height per kind of layer."""


def draw_spectra(found: Mapping[str, Any]) -> Plot:
    """Draw what :func:`~unlearn.evals.curvature.describe.describe` says of the eigenvalues.

    Each is divided by the mean of its matrix, so that layers can be compared, and so that damping
    that goes by the mean is one line for all.
    """
    layers = found["layers"]
    kinds = list(dict.fromkeys(one["layer"] for one in layers))
    columns = [name for name in TITLES if any(name in one["curves"] for one in layers)]
    colours = _colours([one["block"] for one in layers])
    height = 0.75 + PANEL * len(kinds)
    with drawing(height) as figure:
        grid = figure.subplots(len(kinds), len(columns), squeeze=False, sharey=True, sharex="col")
        for axes, kind in zip(grid, kinds, strict=True):
            for panel, name in zip(axes, columns, strict=True):
                chosen = [one for one in layers if one["layer"] == kind]
                _panel(panel, chosen, name, colours)
                _damping(panel, found["damping"], name)
            axes[0].text(0.04, 0.08, kind, transform=axes[0].transAxes)
        for panel, name in zip(grid[0], columns, strict=True):
            panel.set_title(TITLES[name], fontsize=9.5)
        for panel in grid[-1]:
            panel.set_xlabel("rank")
        figure.supylabel("eigenvalue / mean", fontsize=9.5)
        figure.legend(
            handles=list(_legend(colours, found["damping"], columns)),
            loc="outside lower center",
            ncols=5,
            handlelength=1.6,
            columnspacing=1.2,
        )
        return to_plot(figure, "spectra", "Eigenvalues of the curvature against their rank")


def _panel(
    axes: Any, layers: Sequence[Mapping[str, Any]], name: str, colours: Mapping[Any, str]
) -> None:
    for one in layers:
        curve = one["curves"].get(name)
        if not curve or not curve["mean"]:
            continue
        pairs = zip(curve["ranks"], curve["values"], strict=True)
        drawn = [(rank, value / curve["mean"]) for rank, value in pairs]
        shown = [(rank, value) for rank, value in drawn if value >= LOWEST]
        axes.plot(*zip(*shown, strict=True), color=colours[one["block"]], linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, place: _power(value)))
    tidy(axes)


def _power(value: float) -> str:
    """Write a power of ten: 1, 10, 100, and others with an exponent."""
    exponent = round(math.log10(value))
    if 0 <= exponent <= 2:
        return f"{10**exponent}"
    return f"10{str(exponent).translate(SUPERSCRIPTS)}"


def _damping(axes: Any, damping: str | None, name: str) -> None:
    added = added_to_mean(damping, name)
    if added is not None:
        axes.axhline(added, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))


def added_to_mean(damping: str | None, name: str) -> float | None:
    """Give what damping adds to a matrix, over its mean eigenvalue; None where that differs.

    Of ``factored`` damping √c to A and to G each, of ``relative`` c to H.
    """
    if damping is None:
        return None
    how = Damping.parse(damping)
    if how.kind == "absolute":
        return None
    if name == "H":
        return how.c
    return math.sqrt(how.c) if how.kind == "factored" else None


def _colours(blocks: Sequence[int | None]) -> dict[int | None, str]:
    """Give every block a colour: the page's own for a few, else from blue to orange by depth."""
    depths = sorted(set(blocks), key=lambda one: -1 if one is None else one)
    if len(depths) <= len(LINES):
        return dict(zip(depths, LINES, strict=False))
    ramp = LinearSegmentedColormap.from_list("depth", [LINES[0], FAINT, LINES[1]])
    return {one: to_hex(ramp(place / (len(depths) - 1))) for place, one in enumerate(depths)}


def _legend(
    colours: Mapping[int | None, str], damping: str | None, columns: Sequence[str]
) -> Iterator[Line2D]:
    """Name each block where they are few, else the first, the middle and the last."""
    blocks = list(colours)
    if len(blocks) > len(LINES):
        blocks = [blocks[0], blocks[len(blocks) // 2], blocks[-1]]
    for one in blocks:
        label = "all" if one is None else f"block {one}"
        yield Line2D([], [], color=colours[one], linewidth=1.6, label=label)
    if any(added_to_mean(damping, name) is not None for name in columns):
        yield Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (4, 2)), label="damping")
