"""From windows of a document to its passages: which parts stand out, and how far they reach."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.stats import rankdata

from unlearn.detect.windows import Window

FPR = 0.05
"""Windows with at most this p-value stand out; without p-values, this share of the windows."""
MOST_SPANS = 20
PREFERRED = ("minkpp", "mink", "loss")
"""Scores by which a document is judged when none is named, in this order."""


def primary_score(names: Sequence[str]) -> str:
    """Choose the score by which windows are compared; ``ppl`` counts the other way round."""
    chosen = next((name for name in PREFERRED if name in names), None)
    return chosen or next(name for name in names if name != "ppl")


@dataclass(frozen=True)
class Span:
    """Neighbouring windows that all stand out, joined: characters ``start`` to ``end``.

    ``score`` is the highest of them, ``p`` the smallest p-value; None without a calibration.
    """

    start: int
    end: int
    start_token: int
    num_tokens: int
    num_windows: int
    score: float
    p: float | None

    def as_json(self) -> dict[str, Any]:
        """Give the row that is printed and stored."""
        return {
            "start_char": self.start,
            "end_char": self.end,
            "start_token": self.start_token,
            "n_tokens": self.num_tokens,
            "n_windows": self.num_windows,
            "score": self.score,
            "p": self.p,
        }


@dataclass
class Profile:
    """One score of all windows of a document, in order: five numbers per window are kept."""

    score: str
    rows: list[tuple[int, int, int, int, float, float]] = field(default_factory=list)

    def add(self, windows: Iterable[Window]) -> None:
        """Add the next windows."""
        for one in windows:
            value, p = _known(one.scores.get(self.score)), _known(one.p.get(self.score))
            self.rows.append((one.start, one.end, one.start_token, one.num_tokens, value, p))

    def column(self, place: int) -> Float[ndarray, " window"]:
        """Give start, end, first token, tokens, score or p-value (0 to 5) of every window."""
        return np.array([row[place] for row in self.rows], float)

    @property
    def is_calibrated(self) -> bool:
        """Say whether windows have p-values."""
        return bool(self.rows) and not np.isnan(self.column(5)).all()

    @property
    def basis(self) -> Literal["p", "rank"]:
        """Say what levels and spans go by."""
        return "p" if self.is_calibrated else "rank"

    def tail(self) -> Float[ndarray, " window"]:
        """Say how unusual each window is, small being unusual.

        Its p-value, or the share of the document's windows that score as high: that only says which
        parts of this document look most familiar, never that any of them was seen.
        """
        if self.is_calibrated:
            return self.column(5)
        scores = self.column(4)
        known = ~np.isnan(scores)
        found = np.full(scores.size, np.nan)
        if known.any():
            found[known] = rankdata(-scores[known], method="max") / known.sum()
        return found

    def stands_out(self, rate: float = FPR) -> Bool[ndarray, " window"]:
        """Mark the windows that are at most this usual."""
        return self.tail() <= rate

    def spans(self, rate: float = FPR, most: int = MOST_SPANS) -> list[Span]:
        """Join windows that stand out where they touch or overlap; longest passage first."""
        found: list[list[int]] = []
        for place in np.flatnonzero(self.stands_out(rate)):
            if found and self.rows[place][0] <= self.rows[found[-1][-1]][1]:
                found[-1].append(int(place))
            else:
                found.append([int(place)])
        spans = [self._span(places) for places in found]
        return sorted(spans, key=lambda span: (-span.num_tokens, span.start))[:most]

    def _span(self, places: list[int]) -> Span:
        rows = [self.rows[place] for place in places]
        first, last = rows[0], rows[-1]
        p = [row[5] for row in rows if not np.isnan(row[5])]
        tokens = last[2] + last[3] - first[2]
        best = max(row[4] for row in rows)
        return Span(first[0], last[1], first[2], tokens, len(rows), best, min(p, default=None))


def _known(value: float | None) -> float:
    return float("nan") if value is None else value
