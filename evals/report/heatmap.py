"""The heat map of a document: its text, coloured by how much each passage stands out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unlearn.detect.spans import FPR, Profile
from unlearn.evals.report.page import render
from unlearn.runs import write_atomic

LEVELS = (0.5, 0.2, FPR, 0.01)
"""Bounds below which a passage gets the next darker colour."""
EXCERPT = 240
"""Characters shown of a passage in the list."""


@dataclass(frozen=True)
class Segment:
    """A stretch of text that the same windows cover; ``level`` 0 is usual, 4 most unusual."""

    text: str
    level: int
    title: str
    anchor: str = ""


def write_heatmap(
    path: Path, *, name: str, text: str, size: int, profile: Profile, about: Sequence[Any]
) -> None:
    """Write a page that needs nothing but itself.

    ``text`` is the beginning of a document of ``size`` characters; ``about`` are (heading, value)
    pairs on where the numbers come from.
    """
    spans = profile.spans()
    context = {
        "title": f"Heat map: {name}",
        "name": name,
        "segments": segments(text, profile),
        "spans": [_span(number, span, text) for number, span in enumerate(spans, start=1)],
        "calibrated": profile.is_calibrated,
        "score": profile.score,
        "windows": len(profile.rows),
        "left_out": max(0, size - len(text)),
        "about": list(about),
        "legend": _legend(profile.basis),
        "rate": FPR,
    }
    write_atomic(path, render("heatmap.html.j2", context))


def segments(text: str, profile: Profile) -> list[Segment]:
    """Cut the text where windows begin or end; each piece is as unusual as its windows on average.

    On average over the logarithms of their p-values or ranks (the geometric mean).
    """
    if not len(profile.rows) or not text:
        return [Segment(text, 0, "")] if text else []
    starts, ends = profile.rows[:, :2].astype(int).T
    cuts = np.unique(np.concatenate([[0, len(text)], starts, ends]))
    cuts = cuts[cuts <= len(text)]
    tail = np.log(np.maximum(profile.tail(), 1e-12))
    anchors = {span.start: f"passage-{n}" for n, span in enumerate(profile.spans(), start=1)}
    found = []
    for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        first = int(np.searchsorted(ends, begin, side="right"))  # both are sorted
        last = int(np.searchsorted(starts, begin, side="right"))
        covering = tail[first:last]
        value = float(np.exp(np.nanmean(covering))) if np.isfinite(covering).any() else 1.0
        level = sum(value <= bound for bound in LEVELS)
        title = _title(profile, first, last, value)
        found.append(Segment(text[begin:end], level, title, anchors.get(begin, "")))
    return found


def _title(profile: Profile, first: int, last: int, value: float) -> str:
    if first >= last:
        return ""
    scores = profile.rows[first:last, 4]
    tokens = f"tokens {profile.rows[first, 2]:.0f} to {profile.rows[last - 1, 2]:.0f}"
    kind = "p" if profile.is_calibrated else "top share"
    return f"{profile.score} {np.nanmean(scores):.3f}, {kind} {value:.3g}, windows at {tokens}"


def _legend(basis: str) -> list[tuple[int, str]]:
    words = [f"p at most {bound:g}" if basis == "p" else f"top {bound:.0%}" for bound in LEVELS]
    return [(0, "usual"), *enumerate(words, start=1)]


def _span(number: int, span: Any, text: str) -> dict[str, Any]:
    shown = text[span.start : min(span.end, span.start + EXCERPT)]
    return {
        "number": number,
        "start": span.start,
        "end": span.end,
        "tokens": span.num_tokens,
        "score": span.score,
        "p": span.p,
        "text": " ".join(shown.split()) + ("…" if span.end - span.start > EXCERPT else ""),
        "linked": span.start < len(text),
    }
