"""How well one score tells members from non-members: ROC, its area, rates at fixed points.

Scores are higher for what looks more like a member. Every rate counts a text as flagged when its
score is *at or above* a threshold. Intervals are 95 % percentile bootstrap intervals: members and
non-members are resampled separately. They say how much a figure would move with other texts of the
same two kinds; they say nothing about other kinds of texts.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.stats import rankdata

RESAMPLES = 1000
LEVELS = (2.5, 97.5)
FPRS = (0.05, 0.01, 0.001)
"""False-positive rates at which the true-positive rate is given, as far as there are texts."""
TPR = 0.95
"""True-positive rate at which the false-positive rate is given."""
Clusters = tuple[ArrayLike, ArrayLike]
"""Which cluster each member and each non-member belongs to, by any name or number."""
DRAWS_AT_ONCE = 2**22
"""Counts held at once by the bootstrap: 32 MiB, whatever the number of texts."""


class Roc(NamedTuple):
    """The points of a ROC curve, from no text flagged (threshold infinity) to all of them.

    At ``thresholds[i]`` the share ``tpr[i]`` of members and ``fpr[i]`` of non-members is flagged.
    Equal scores make one point: a tie is never cut in favour of anyone.
    """

    thresholds: Float[ndarray, " point"]
    tpr: Float[ndarray, " point"]
    fpr: Float[ndarray, " point"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval; ``value`` is None where ``note`` says why.

    ``reached``: the false-positive (or true-positive) rate at the point where it was read, which
    with few texts differs from the one asked for.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reached: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Give what is known, as JSON knows it."""
        return {name: value for name, value in vars(self).items() if value not in (None, "")} | {
            "value": self.value
        }


@dataclass(frozen=True)
class Separation:
    """How well a score tells ``members`` texts from ``nonmembers`` texts; all rates in [0, 1]."""

    auc: Estimate
    fpr_at_95_tpr: Estimate
    balanced_accuracy: Estimate
    members: int
    nonmembers: int
    tpr_at: Mapping[float, Estimate] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Name the figures as tables do: ``tpr@5%fpr``."""
        tpr = {f"tpr@{100 * fpr:g}%fpr": found.to_dict() for fpr, found in self.tpr_at.items()}
        return {
            "auc": self.auc.to_dict(),
            **tpr,
            "fpr@95%tpr": self.fpr_at_95_tpr.to_dict(),
            "balanced_accuracy": self.balanced_accuracy.to_dict(),
            "members": self.members,
            "nonmembers": self.nonmembers,
        }


def auc(low: ArrayLike, high: ArrayLike) -> float:
    """Give the probability that a row of ``high`` scores above one of ``low``; ties count half.

    The area under the ROC curve, in [0, 1], from ranks: the same for every increasing transform.
    With scores of this package, ``auc(nonmembers, members)``.
    """
    low, high = np.asarray(low, float), np.asarray(high, float)
    ranks = rankdata(np.concatenate([low, high]))[low.size :]
    return float((ranks.sum() - high.size * (high.size + 1) / 2) / (low.size * high.size))


def roc(*, members: ArrayLike, nonmembers: ArrayLike) -> Roc:
    """Give the ROC curve of two sets of scores."""
    tie = _Ties(members, nonmembers)
    tpr, fpr = _rates(tie.members[None]), _rates(tie.nonmembers[None])
    return Roc(np.append(np.inf, tie.thresholds), tpr[0], fpr[0])


def tpr_at_fpr(*, members: ArrayLike, nonmembers: ArrayLike, fpr: float) -> tuple[float, float]:
    """Give the share of members flagged when at most the share ``fpr`` of non-members is.

    Read at the last point of the curve with FPR <= ``fpr``, without interpolation (Min-K%++'s code;
    that of Min-K% asks for <). The second number is the FPR at that point.
    """
    curve = roc(members=members, nonmembers=nonmembers)
    place = int((curve.fpr <= fpr + 1e-12).sum()) - 1
    return float(curve.tpr[place]), float(curve.fpr[place])


def fpr_at_tpr(
    *, members: ArrayLike, nonmembers: ArrayLike, tpr: float = TPR
) -> tuple[float, float]:
    """Give the share of non-members flagged when at least the share ``tpr`` of members is.

    Read at the first point with TPR >= ``tpr``. The second number is the TPR at that point.
    """
    curve = roc(members=members, nonmembers=nonmembers)
    place = int((curve.tpr < tpr - 1e-12).sum())
    return float(curve.fpr[place]), float(curve.tpr[place])


def separation(
    *,
    members: ArrayLike,
    nonmembers: ArrayLike,
    clusters: Clusters | None = None,
    seed: int = 0,
    fprs: tuple[float, ...] = FPRS,
) -> Separation:
    """Measure a score on labelled texts; every figure with its interval.

    The true-positive rate at an FPR of a is given from 1/a non-members on: with fewer, it is that
    at an FPR of 0. ``clusters`` names the cluster of every member and of every non-member (an
    author, a book): texts of one cluster are not independent, so whole clusters are resampled, and
    intervals are as wide as they should be. No score may be NaN.
    """
    tie = _Ties(members, nonmembers, clusters)
    sizes = int(tie.members.sum()), int(tie.nonmembers.sum())
    draws = tie.draws(seed, fprs)
    area = _estimate(auc(nonmembers, members), draws["auc"])
    rate, reached = fpr_at_tpr(members=members, nonmembers=nonmembers)
    accuracy = _rates(tie.members[None]) - _rates(tie.nonmembers[None])
    return Separation(
        area,
        _estimate(rate, draws["fpr"], reached),
        _estimate(float((1 + accuracy.max()) / 2), draws["accuracy"]),
        *sizes,
        {fpr: _tpr_estimate(members, nonmembers, fpr, draws[f"tpr {fpr}"]) for fpr in fprs},
    )


def _tpr_estimate(
    members: ArrayLike, nonmembers: ArrayLike, fpr: float, draws: ndarray
) -> Estimate:
    given, needed = np.size(nonmembers), math.ceil(1 / fpr - 1e-9)
    if given < needed:
        return Estimate(None, note=f"needs {needed} non-members; there are {given}")
    rate, reached = tpr_at_fpr(members=members, nonmembers=nonmembers, fpr=fpr)
    return _estimate(rate, draws, reached)


def auc_draws(
    *,
    members: ArrayLike,
    nonmembers: ArrayLike,
    clusters: Clusters | None = None,
    seed: int = 0,
) -> Float[ndarray, " draw"]:
    """Give the AUC of every bootstrap resample, [RESAMPLES].

    Equal seeds and sizes draw the same texts: the difference of the draws of two scores (or of two
    models) on the same texts is paired.
    """
    return _Ties(members, nonmembers, clusters).draws(seed, ())["auc"]


def interval(draws: ArrayLike) -> tuple[float, float]:
    """Give the 2.5th and 97.5th percentile; NaN when a draw is."""
    values = np.asarray(draws, float)
    if np.isnan(values).any():
        return math.nan, math.nan
    low, high = np.percentile(values, LEVELS)
    return float(low), float(high)


@functools.lru_cache(16)
def resampled(rows: int, seed: int, stream: int) -> Float[ndarray, "draw row"]:
    """Say how often each row is drawn, [resamples, rows]; every row of it sums to ``rows``."""
    generator = np.random.default_rng([seed, stream, rows])
    return generator.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES).astype(float)


class _Ties:
    """Two sets of scores grouped by equal score, highest first: the bootstrap only counts."""

    def __init__(
        self, members: ArrayLike, nonmembers: ArrayLike, clusters: Clusters | None = None
    ) -> None:
        sides = np.asarray(members, float), np.asarray(nonmembers, float)
        if not all(side.size for side in sides):
            raise ValueError("both sides need at least one score")
        both = np.concatenate(sides)
        if np.isnan(both).any():
            raise ValueError("a score is not a number; leave such texts out and count them")
        self.clusters = None
        if clusters is not None:
            self.clusters = [np.unique(np.asarray(c), return_inverse=True)[1] for c in clusters]
        values, groups = np.unique(-both, return_inverse=True)
        self.thresholds = -values
        self.groups = groups[: sides[0].size], groups[sides[0].size :]
        self.members, self.nonmembers = (
            np.bincount(side, minlength=values.size).astype(float) for side in self.groups
        )

    def draws(self, seed: int, fprs: tuple[float, ...]) -> dict[str, ndarray]:
        """Give every figure on every resample, some resamples at a time."""
        members, nonmembers = self.groups
        step = max(1, DRAWS_AT_ONCE // self.thresholds.size)
        parts = []
        for start in range(0, RESAMPLES, step):
            chosen = slice(start, start + step)
            no = _grouped(self._drawn(1, seed)[chosen], nonmembers, self.thresholds)
            yes = _grouped(self._drawn(0, seed)[chosen], members, self.thresholds)
            parts.append(_figures(yes, no, fprs))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _drawn(self, side: int, seed: int) -> Float[ndarray, "draw row"]:
        """Say how often each row of a side is drawn: alone, or with its whole cluster."""
        stream = 1 - side
        if self.clusters is None:
            return resampled(self.groups[side].size, seed, stream)
        which = self.clusters[side]
        return resampled(int(which.max()) + 1, seed, stream)[:, which]


def _grouped(counts: ndarray, groups: ndarray, thresholds: ndarray) -> ndarray:
    """Add up the counts of rows with equal scores, [draw, threshold]."""
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    found = np.zeros((len(counts), thresholds.size))
    found[:, present] = np.add.reduceat(counts[:, order], starts, axis=1)
    return found


def _rates(counts: ndarray) -> ndarray:
    """Turn counts per threshold into the share at or above each, with 0 in front."""
    summed = counts.cumsum(1)
    return np.concatenate([np.zeros((len(counts), 1)), summed / summed[:, -1:]], axis=1)


def _figures(members: ndarray, nonmembers: ndarray, fprs: tuple[float, ...]) -> dict[str, ndarray]:
    """Give every figure per draw from counts [draw, threshold]."""
    tpr, fpr = _rates(members), _rates(nonmembers)
    rows = np.arange(len(tpr))
    steps = (tpr[:, 1:] + tpr[:, :-1]) / 2 * np.diff(fpr, axis=1)
    found = {
        "auc": steps.sum(1),
        "fpr": fpr[rows, (tpr < TPR - 1e-12).sum(1)],
        "accuracy": (1 + (tpr - fpr).max(1)) / 2,
    }
    for rate in fprs:
        found[f"tpr {rate}"] = tpr[rows, (fpr <= rate + 1e-12).sum(1) - 1]
    return found


def _estimate(value: float, draws: ndarray, reached: float | None = None) -> Estimate:
    return Estimate(value, *interval(draws), reached=reached)
