"""What all plots share: look, colours that follow light and dark, and a clean SVG."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, FAINT, PAPER = "#1c2330", "#8a93a0", "#fefefe"
LINES = ("#0b6e8f", "#b4540a", "#5b4b9a", "#2f7d4f")
THEME = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    PAPER: "var(--paper)",
    **{line: f"var(--line-{n})" for n, line in enumerate(LINES)},
}
"""Colours of the drawing -> the page's own, so that it follows light and dark."""

MODELS = {"before": "Before", "after": "After", "retain_model": "Retain model"}
COLOURS = {"before": FAINT, "after": LINES[0], "retain_model": LINES[1]}
WIDTH = 5.4
"""Inches; narrow, so that the words stay readable on a telephone."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unlearn",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Plot:
    """A drawing: file name without ending, what it shows in one line, and the SVG itself."""

    name: str
    title: str
    svg: str

    def themed(self, prefix: str = "") -> Markup:
        """Let a page colour it; ids are made unique to this drawing, or to ``prefix``."""
        svg = self.svg
        for colour, variable in THEME.items():
            svg = svg.replace(colour, variable)
        svg = re.sub(r"font-family: [^;]*;", "font-family: inherit;", svg)
        svg = _with_own_ids(svg, f"{prefix}{self.name}-")
        return Markup(
            svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.title)}" ', 1)
        )

    def standalone(self) -> str:
        """Put it on white paper, as a file of its own."""
        svg = self.svg.replace(PAPER, "#ffffff")
        return svg.replace(">", '><rect width="100%" height="100%" fill="#ffffff"/>', 1)


@contextmanager
def drawing(height: float, *, width: float = WIDTH) -> Iterator[Figure]:
    """Give a figure in the style of the report."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def to_plot(figure: Figure, name: str, title: str) -> Plot:
    """Take the SVG of a figure: no prologue, document type, metadata or date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return Plot(name, title, svg)


def tidy(axes: Any) -> None:
    """Draw short ticks and faint lines behind the data."""
    axes.tick_params(length=3)
    axes.set_axisbelow(True)
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)


def _with_own_ids(svg: str, prefix: str) -> str:
    """Drop the ids nobody refers to, and prefix the others."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    return re.sub(r'(id="|href="#|url\(#)([^")]+)', rf"\g<1>{prefix}\2", svg)
