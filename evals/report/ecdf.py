"""How far two sets of truth ratios are apart: their cumulative shares, and the KS distance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import ArrayLike, NDArray

from unlearn.evals.report.plots import COLOURS, INK, MODELS, Plot, drawing, tidy, to_plot
from unlearn.evals.report.table import finite, number
from unlearn.evals.statistics import forget_quality

WIDE = 20.0
"""Ratios that span more than this factor are drawn on a logarithmic scale."""

LINE = {
    "before": {"linestyle": (0, (1, 1.2)), "linewidth": 1.6},
    "after": {"linestyle": "-", "linewidth": 2.0},
    "retain_model": {"linestyle": (0, (5, 1.6)), "linewidth": 2.0},
}


@dataclass(frozen=True)
class Distance:
    """The two-sample Kolmogorov–Smirnov test between a model and the retain model.

    ``distance`` is the largest gap between the two cumulative shares, in [0, 1], which does not
    depend on the number of rows; it is reached at ``place``, where the shares are ``shares``.
    ``p`` is the probability of a gap at least as large were both drawn from one distribution
    (two-sided); on TOFU's forget truth ratios it is the forget quality (arXiv:2401.06121).
    """

    distance: float
    place: float
    shares: tuple[float, float]
    p: float
    log10_p: float
    n: tuple[int, int]


def shares(values: Sequence[float], places: ArrayLike) -> NDArray[np.float64]:
    """Give the share of values at or below each place: the empirical distribution function."""
    return np.asarray(np.searchsorted(np.sort(values), places, side="right") / len(values))


def ks_distance(values: Sequence[float], others: Sequence[float]) -> Distance:
    """Measure the gap between two samples; at several equal gaps the lowest place counts."""
    places = np.unique(np.concatenate([values, others]))
    ours, theirs = shares(values, places), shares(others, places)
    widest = int(np.argmax(np.abs(ours - theirs).round(12)))  # equal gaps differ in the last bit
    test = forget_quality(values, others)
    return Distance(
        float(abs(ours[widest] - theirs[widest])),
        float(places[widest]),
        (float(ours[widest]), float(theirs[widest])),
        test.p,
        test.log10_p,
        (len(values), len(others)),
    )


def usable_ratios(truth_ratios: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """Keep the finite ratios of each model; models without any are left out."""
    kept = {
        who: [x for value in truth_ratios.get(who) or [] if (x := finite(value)) is not None]
        for who in MODELS
    }
    return {who: values for who, values in kept.items() if values}


def distances(ratios: Mapping[str, Sequence[float]]) -> dict[str, Distance]:
    """Compare the other models with the retain model; empty when there is none."""
    if "retain_model" not in ratios:
        return {}
    return {
        who: ks_distance(values, ratios["retain_model"])
        for who, values in ratios.items()
        if who != "retain_model"
    }


def draw_ecdf(ratios: Mapping[str, Sequence[float]], titles: Mapping[str, str]) -> Plot | None:
    """Draw the share of forget rows at or below each truth ratio; None without ratios.

    The KS distance between the model and the retain model is the vertical bar.
    """
    if not ratios:
        return None
    with drawing(2.9) as figure:
        axes = figure.subplots()
        for who in sorted(ratios, key=list(MODELS).index):
            ordered = np.sort(ratios[who])
            steps = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.step(
                np.concatenate([ordered[:1], ordered]),
                np.concatenate([[0.0], steps]),
                where="post",
                color=COLOURS[who],
                label=titles.get(who, MODELS[who]),
                **LINE[who],
            )
        found = distances(ratios).get("after")
        if found:
            _draw_distance(axes, found)
        _scale(axes, [x for values in ratios.values() for x in values])
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("share of forget rows")
        axes.set_xlabel("truth ratio")
        axes.legend(loc="best", handlelength=2.4)
        tidy(axes)
        return to_plot(figure, "truth-ratios", "Cumulative distribution of the truth ratios")


def _draw_distance(axes: Axes, found: Distance) -> None:
    low, high = sorted(found.shares)
    label = f"KS distance {number(found.distance)}"
    axes.plot(
        [found.place] * 2,
        [low, high],
        color=INK,
        linewidth=2,
        marker="_",
        markersize=7,
        label=label,
    )


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) / min(values) > WIDE:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
