"""From a score to a p-value: how unusual is a text among texts that were surely never seen?

The null hypothesis is always "this text is like the references". Everything rests on one
condition: were the suspect no member, it could change places with any reference (same kind, time,
length and treatment). No test can check that from the scores; :mod:`unlearn.detect.blind` catches
what can be seen without the model.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.stats import beta, mannwhitneyu

from unlearn.errors import UserError

TOLERANCE = 1e-9
"""Shares such as 5/100 are compared with 0.05 as if both were exact."""


class NotCalibrated(UserError):
    """A decision was asked for that the references cannot carry: too few, or of another kind."""

    exit_code = 4


def p_values(scores: ArrayLike, references: ArrayLike) -> Float[ndarray, " text"]:
    """Give the share of references that score at least as high, the suspect itself counted in.

    p = (1 + #{r >= s}) / (m + 1), in (0, 1]: split conformal p-values, for which
    P(p <= a) <= a for every a, whatever the distribution of scores, if the suspect is exchangeable
    with the m references (Vovk, Gammerman and Shafer 2005; Bates et al. 2023, arXiv:2104.08279,
    eq. 2). A suspect without a score (NaN) has p = NaN.
    """
    scores, ordered = np.asarray(scores, float), np.sort(_known(references))
    at_least = ordered.size - np.searchsorted(ordered, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + at_least) / (ordered.size + 1))


def length_matched(
    scores: ArrayLike,
    tokens: ArrayLike,
    references_at: Callable[[int], ArrayLike],
) -> tuple[Float[ndarray, " text"], Int[ndarray, " text"]]:
    """Give p-values against references cut to each suspect's own length, and how many there were.

    ``references_at(n)`` gives the scores of the references' first n tokens, without those that are
    shorter; it is asked once per length. A causal model's log-probabilities do not depend on what
    follows, so this costs no forward pass. Without any reference of that length p is NaN.
    """
    scores, tokens = np.asarray(scores, float), np.asarray(tokens, int)
    p, used = np.full(scores.size, np.nan), np.zeros(scores.size, int)
    for length in np.unique(tokens):
        references, same = _known(references_at(int(length))), tokens == length
        used[same] = references.size
        if references.size:
            p[same] = p_values(scores[same], references)
    return p, used


def references_needed(fpr: float) -> int:
    """Give the least number of references with which any p-value can be ``fpr`` or less."""
    return math.ceil(1 / fpr - TOLERANCE) - 1


def check_enough(references: int, fpr: float) -> None:
    """Refuse a false-positive rate that so few references cannot show.

    Raises:
        NotCalibrated: the smallest possible p-value, 1 / (m + 1), is above ``fpr``.
    """
    if not 0 < fpr < 1:
        raise UserError(f"fpr={fpr} is not a rate", "give more than 0 and less than 1, as 0.05")
    needed = references_needed(fpr)
    if references < needed:
        raise NotCalibrated(
            f"{references} reference texts cannot carry a false-positive rate of {fpr:g}: "
            f"the smallest possible p is {1 / (references + 1):.2g}",
            f"need at least {needed} reference texts, or a higher --fpr",
        )


def flagged(p: ArrayLike, rate: float) -> ndarray:
    """Say which p-values (or q-values) are at most ``rate``; never one that is NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(p, float) <= rate + TOLERANCE


def benjamini_hochberg(p: ArrayLike) -> Float[ndarray, " text"]:
    """Give q-values: calling every text with q <= a keeps the expected share of false calls <= a.

    q_(i) = min over j >= i of p_(j) n / j (Benjamini and Hochberg 1995). It holds for independent
    p-values and for conformal ones that share their references (Bates et al. 2023,
    arXiv:2104.08279, theorem 2). NaN stays NaN and is not counted in n.
    """
    p = np.asarray(p, float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    ratios = p[order] * order.size / np.arange(1, order.size + 1)
    found = np.full(p.size, np.nan)
    found[order] = np.minimum(np.minimum.accumulate(ratios[::-1])[::-1], 1.0)
    return found


def bonferroni(p: Float[ndarray, "score text"]) -> Float[ndarray, " text"]:
    """Give one p-value for several scores of each text: the number of scores times the smallest.

    What choosing the best-looking score after the fact costs. Scores without a p do not count.
    """
    known = ~np.isnan(p)
    smallest = np.where(known, p, 1.0).min(0)
    return np.where(known.any(0), np.minimum(1.0, smallest * known.sum(0)), np.nan)


def cauchy_combination(p: ArrayLike) -> float:
    """Combine dependent p-values, as those of overlapping windows, into one.

    T = mean of tan((0.5 - p) pi), p = 0.5 - atan(T) / pi (Liu and Xie 2020, arXiv:1808.09011).
    Deviation: a p of exactly 1, as a conformal one can be, has T = -infinity and would outweigh any
    evidence; it counts as 1 - 1/n. NaN does not count.
    """
    p = _known(p)
    if p.size < 2:
        return float(p[0]) if p.size else math.nan
    finite = np.where(p >= 1, 1 - 1 / p.size, p)
    terms = np.tan((0.5 - finite) * np.pi)
    return float(0.5 - np.arctan(terms.mean()) / np.pi)


def shifted_upwards(windows: ArrayLike, references: ArrayLike) -> float:
    """Give the p-value of "the windows of a file score no higher than reference windows do".

    One-sided Mann-Whitney U. Windows must not overlap (neither side's): overlapping ones are not
    independent and make p far too small; combine their p-values with :func:`cauchy_combination`.
    """
    windows, references = _known(windows), _known(references)
    if not windows.size or not references.size:
        return math.nan
    return float(mannwhitneyu(windows, references, alternative="greater").pvalue)


def share_interval(count: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Give the two-sided exact interval of a share of ``n`` texts (Clopper and Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, n - count + 1))
    high = 1.0 if count == n else float(beta.ppf(1 - tail, count + 1, n - count))
    return low, high


def _known(values: ArrayLike) -> ndarray:
    values = np.asarray(values, float).reshape(-1)
    return values[~np.isnan(values)]
