"""From windows of a document to its passages: which parts stand out, and how far they reach."""

from collections.abc import Sequence
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
    """One score of all windows of a document, in order: six numbers per window are kept."""

    score: str
    parts: list[Float[ndarray, "window 6"]] = field(default_factory=list, repr=False)

    def add(self, windows: Sequence[Window]) -> None:
        """Add the next windows."""
        if windows:
            self.parts.append(np.array([self._numbers(one) for one in windows], float))

    def _numbers(self, one: Window) -> tuple[int | float | None, ...]:
        value, p = one.scores.get(self.score), one.p.get(self.score)  # None becomes NaN
        return one.start, one.end, one.start_token, one.num_tokens, value, p

    @property
    def rows(self) -> Float[ndarray, "window 6"]:
        """Give start, end, first token, number of tokens, score and p-value of every window."""
        if len(self.parts) != 1:
            self.parts = [np.concatenate([np.empty((0, 6)), *self.parts])]
        return self.parts[0]

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the document that were scored."""
        return int(self.rows[-1, 2] + self.rows[-1, 3]) if len(self.rows) else 0

    @property
    def is_calibrated(self) -> bool:
        """Say whether windows have p-values."""
        return not np.isnan(self.rows[:, 5]).all()

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
            return self.rows[:, 5]
        scores = self.rows[:, 4]
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
            if found and self.rows[place, 0] <= self.rows[found[-1][-1], 1]:
                found[-1].append(int(place))
            else:
                found.append([int(place)])
        spans = [self._span(places) for places in found]
        return sorted(spans, key=lambda span: (-span.num_tokens, span.start))[:most]

    def _span(self, places: list[int]) -> Span:
        rows = self.rows[places]
        first, last = rows[0], rows[-1]
        start, end, token = int(first[0]), int(last[1]), int(first[2])
        tokens = int(last[2] + last[3]) - token
        p = float(np.nanmin(rows[:, 5])) if self.is_calibrated else None
        return Span(start, end, token, tokens, len(rows), float(np.nanmax(rows[:, 4])), p)
