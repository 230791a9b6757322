"""What may be said about each text, and about all of them: calls with their error rates.

A score alone decides nothing. With references (surely never seen) every text gets a p-value; with
many texts also a q-value, because at a false-positive rate of 5 % a hundred innocent texts give
five false calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.typing import ArrayLike

from unlearn.detect.conformal import (
    benjamini_hochberg,
    bonferroni,
    cauchy_combination,
    check_enough,
    flagged,
    p_values,
    references_needed,
    shifted_upwards,
)
from unlearn.errors import unknown

Call = Literal["member", "not_detected"]
NO_CALIBRATION = "no_calibration"
"""Why there is no decision: no references were given."""


@dataclass(frozen=True)
class Decisions:
    """The calls on many texts.

    ``p``: per score, one p-value per text (NaN: no score, or no reference of its length).
    ``deciding``: the p-value that decides, that of ``primary``, or Bonferroni's over all scores;
    NaN without enough references.
    ``q``: its Benjamini-Hochberg q-value. ``member``: p at most ``fpr``. ``listed``: q at most
    ``fdr``, the calls that hold up among so many texts. ``references``: per text, how many it was
    compared with.
    """

    p: dict[str, Float[ndarray, " text"]]
    deciding: Float[ndarray, " text"]
    q: Float[ndarray, " text"]
    member: Bool[ndarray, " text"]
    listed: Bool[ndarray, " text"]
    references: Int[ndarray, " text"]
    primary: str | None
    fpr: float
    fdr: float

    def rows(self) -> list[dict[str, Any]]:
        """Give one record per text: p per score, q, the number of references and the decision."""
        return [
            {
                "p": {name: _plain(values[place]) for name, values in self.p.items()},
                "q": _plain(self.q[place]),
                "references": int(self.references[place]),
                "decision": self.call(place),
            }
            for place in range(self.q.size)
        ]

    def call(self, place: int) -> Call | None:
        """Give the decision on one text; None where it has no p-value."""
        if np.isnan(self.deciding[place]):
            return None
        return "member" if self.member[place] else "not_detected"


def decide(
    scores: Mapping[str, ArrayLike],
    references: Mapping[str, ArrayLike],
    *,
    primary: str | None = None,
    fpr: float = 0.05,
    fdr: float = 0.1,
) -> Decisions:
    """Compare texts with references, score by score.

    Both map a score to its values per text. ``primary``, one score, must be chosen before the
    numbers are seen; without it all scores count and their p-values are multiplied by their number.

    Raises:
        NotCalibrated: too few references for ``fpr``.
        UserError: ``primary`` was not computed.
    """
    found = {name: p_values(values, references[name]) for name, values in scores.items()}
    least = min(int((~np.isnan(np.asarray(references[name], float))).sum()) for name in scores)
    used = np.full(len(next(iter(found.values()))), least)
    return from_p_values(found, used, primary=primary, fpr=fpr, fdr=fdr)


def from_p_values(
    p: Mapping[str, ArrayLike],
    references: ArrayLike,
    *,
    primary: str | None = None,
    fpr: float = 0.05,
    fdr: float = 0.1,
) -> Decisions:
    """Turn p-values into calls; see :func:`decide`.

    On texts with too few references for ``fpr`` (of their length) there is no decision. When no
    text has enough, that is an error.
    """
    if primary is not None and primary not in p:
        raise unknown("score", primary, p)
    used = np.asarray(references, int)
    tests = 1 if primary is not None else len(p)
    check_enough(int(used.max(initial=0)), fpr / tests)
    table = {name: np.asarray(values, float) for name, values in p.items()}
    deciding = table[primary] if primary is not None else bonferroni(np.stack([*table.values()]))
    deciding = np.where(used >= references_needed(fpr / tests), deciding, np.nan)
    q = benjamini_hochberg(deciding)
    return Decisions(
        table, deciding, q, flagged(deciding, fpr), flagged(q, fdr), used, primary, fpr, fdr
    )


@dataclass(frozen=True)
class FileEvidence:
    """What the windows of one long text say together.

    ``p``: p-value of "the whole text is like the references". ``median_p``: the p-value of its
    middle window, 0.5 for text like the references: how strong the effect is, not how sure.
    """

    p: float
    median_p: float
    windows: int
    method: Literal["mann-whitney", "cauchy"]


def judge_file(
    windows: ArrayLike, references: ArrayLike, *, overlapping: bool = False
) -> FileEvidence:
    """Judge a long text by the scores of its windows.

    Windows that do not overlap: Mann-Whitney U. Overlapping ones: their p-values, combined by
    Cauchy's distribution, which tolerates dependence. References are windows scored the same way.
    """
    p = p_values(windows, references)
    known = p[~np.isnan(p)]
    median = float(np.median(known)) if known.size else float("nan")
    if overlapping:
        return FileEvidence(cauchy_combination(p), median, known.size, "cauchy")
    return FileEvidence(shifted_upwards(windows, references), median, known.size, "mann-whitney")


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
