"""What the rows of a benchmark say together: truth ratios, forget quality, model utility.

Pure functions of numbers; none of them sees a model. Intervals are 95 % percentile bootstrap
intervals over rows: they say how much the figure would move with other questions of the same kind,
not with another training seed.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hmean, ks_2samp

from unlearn.detect.roc import auc_draws, interval, resampled
from unlearn.errors import UserError
from unlearn.evals.benchmark import Metric

TruthRatio = Literal["geometric", "arithmetic", "prob_mean"]
Array = NDArray[np.float64]
Interval = tuple[float, float]

EPSILON = 1e-10
"""What open-unlearning adds to denominators."""

UTILITY_PARTS: dict[str, tuple[str, ...]] = {
    "retain": ("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
    "ra": ("ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"),
    "wf": ("wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"),
}
"""The nine means of model utility, by the block whose rows they are means over."""


@dataclass(frozen=True)
class RetainSide:
    """What a comparison with the retain model needs of it.

    ``truth_ratios``: row of the forget set -> R; ``auc``: attack (``loss``, ``zlib``, ``min_k``,
    ``min_k_plus_plus``) -> AUC; ``source`` names the model or the log file in messages.
    """

    truth_ratios: dict[int, float]
    auc: dict[str, float]
    source: str


class ForgetQuality(NamedTuple):
    """How well two sets of truth ratios could come from one model.

    ``p``: p-value of the two-sided two-sample Kolmogorov-Smirnov test, in [0, 1], 1 when the sets
    are alike; ``log10_p`` its decimal logarithm; ``ks`` the largest distance of the two cumulative
    distributions, in [0, 1], which unlike p does not shrink with the number of rows.
    """

    p: float
    log10_p: float
    ks: float


def truth_ratio(
    correct_loss: ArrayLike,
    wrong_losses: ArrayLike,
    *,
    variant: TruthRatio = "geometric",
    epsilon: float = 0.0,
) -> Array:
    """Compare how probable wrong answers are with how probable the right one is, per row.

    Losses are mean negative log-probabilities per token in nats, ``wrong_losses`` with one more
    axis. R = wrong / correct, 0 or more: below 1 the model prefers the right answer. ``geometric``
    takes the geometric mean of the wrong answers (TOFU's evaluation script, open-unlearning),
    ``arithmetic`` the arithmetic mean (Maini et al. 2024, arXiv:2401.06121, eq. 1);
    ``prob_mean`` is no ratio but the share correct / (correct + wrong), in [0, 1], with the
    geometric mean (OpenUnlearning, arXiv:2506.12618). ``epsilon`` is added to the denominator
    (open-unlearning: 1e-10).
    """
    correct, wrong = np.asarray(correct_loss, float), np.asarray(wrong_losses, float)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
        mean = wrong.mean(-1)
        if variant == "prob_mean":
            # exp(-c) / (exp(-c) + exp(-w) + epsilon) without underflow of both
            added = epsilon * np.exp(correct) if epsilon else 0.0
            return 1.0 / (1.0 + np.exp(correct - mean) + added)
        if variant == "arithmetic":
            mean = -np.log(np.exp(-wrong).mean(-1))
        if epsilon:
            return np.exp(-mean) / (np.exp(-correct) + epsilon)
        return np.exp(correct - mean)


def forget_ratios(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Give the truth ratios of the forget set, for the plot of their distributions."""
    return [
        record["truth_ratio"]
        for record in records
        if record.get("split") == "forget" and record.get("truth_ratio") is not None
    ]


def closer_to_1(ratios: ArrayLike, *, epsilon: float = 0.0) -> Array:
    """Give min(R, 1/R) per row, in [0, 1]: 1 when right and wrong answers are equally likely.

    How TOFU reads truth ratios of the forget set; R = 0 gives 0. ``epsilon``: open-unlearning's
    1 / (R + 1e-10).
    """
    ratios = np.asarray(ratios, float)
    with np.errstate(divide="ignore"):
        return np.minimum(ratios, 1.0 / (ratios + epsilon))


def true_better(ratios: ArrayLike) -> Array:
    """Give max(0, 1 - R) per row, in [0, 1]: 1 when wrong answers are impossible.

    How TOFU reads truth ratios of everything that is to be kept.
    """
    return np.maximum(0.0, 1.0 - np.asarray(ratios, float))


def readable(
    ratios: ArrayLike, split: str, *, variant: TruthRatio = "geometric", epsilon: float = 0.0
) -> Array:
    """Give what a split's truth-ratio metric is the mean of, per row, in [0, 1].

    :func:`closer_to_1` on the forget set, :func:`true_better` elsewhere; ``prob_mean`` as it is.
    """
    if variant == "prob_mean":
        return np.asarray(ratios, float)
    return closer_to_1(ratios, epsilon=epsilon) if split == "forget" else true_better(ratios)


def forget_quality(unlearned: ArrayLike, retain: ArrayLike) -> ForgetQuality:
    """Test whether truth ratios of the forget set could be those of the retain model.

    Two-sided two-sample Kolmogorov-Smirnov test, scipy's default method (exact up to 10,000 rows);
    the same for R and 1/R (Maini et al. 2024, section 2.2.2). Where p is too small for a double
    (two sets of over 500 rows that do not overlap), ``log10_p`` is that of the leading term of the
    asymptotic distribution, 2 exp(-2 ks^2 nm/(n+m)), which lies above the exact value.

    Raises:
        UserError: one side has no rows or a NaN.
    """
    ours, theirs = np.asarray(unlearned, float), np.asarray(retain, float)
    for name, side in (("the model", ours), ("the retain model", theirs)):
        if side.size == 0 or np.isnan(side).any():
            what = "there are none" if side.size == 0 else "one is not a number"
            raise UserError(f"truth ratios of {name}: {what}", "check the model or its logs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # exact p out of reach: asymptotic instead
        test = ks_2samp(ours, theirs)
    p, distance = float(test.pvalue), float(test.statistic)
    if p > 0:
        log10_p = 0.0 if p > 1 - 1e-12 else math.log10(p)  # the test rounds 1 a little down
        return ForgetQuality(p, log10_p, distance)
    size = ours.size * theirs.size / (ours.size + theirs.size)
    return ForgetQuality(0.0, math.log10(2) - 2 * size * distance**2 / math.log(10), distance)


def model_utility(parts: Sequence[float]) -> float:
    """Give the harmonic mean of parts in [0, 1]; 0 when one is 0, NaN when one is NaN.

    Over the nine of :data:`UTILITY_PARTS` it is TOFU's model utility (Maini et al. 2024).
    """
    values = np.asarray(parts, float)
    if np.isnan(values).any():
        return math.nan
    return 0.0 if (values == 0).any() else float(hmean(values))


def mean_with_interval(metric: Metric, values: Sequence[float], *, seed: int = 0) -> Metric:
    """Give a mean over rows its interval."""
    draws = resampled(len(values), seed, 0) @ np.asarray(values, float) / len(values)
    return with_interval(metric, interval(draws))


def with_interval(metric: Metric, interval: Interval) -> Metric:
    """Set both ends of a metric's interval."""
    return replace(metric, low=interval[0], high=interval[1])


def utility_interval(blocks: Sequence[Sequence[Sequence[float]]], *, seed: int = 0) -> Interval:
    """Bound model utility: rows are resampled within blocks, all parts of a row together.

    ``blocks`` holds per block [rows, parts]; every part is a mean over its block's rows.
    """
    parts = []
    for stream, block in enumerate(blocks):
        rows = np.asarray(block, float)
        parts.append(resampled(len(rows), seed, stream) @ rows / len(rows))
    means = np.concatenate(parts, axis=1)
    with np.errstate(divide="ignore"):
        return interval(means.shape[1] / (1.0 / means).sum(1))


def auc_interval(forget: ArrayLike, holdout: ArrayLike, *, seed: int = 0) -> Interval:
    """Bound an AUC: rows of both sets are resampled independently; NaN when a score is."""
    if np.isnan(forget).any() or np.isnan(holdout).any():
        return math.nan, math.nan
    return interval(auc_draws(members=holdout, nonmembers=forget, seed=seed))


def harmonic(parts: Mapping[str, float | None]) -> float | None:
    """Give the harmonic mean of named parts, each clipped to [0, 1]; None when one is missing."""
    values = [value for value in parts.values() if value is not None and not math.isnan(value)]
    return model_utility(np.clip(values, 0, 1).tolist()) if len(values) == len(parts) else None
