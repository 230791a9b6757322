"""Texts judged by a model next to texts it surely never saw: p-values, calls, words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray

from unlearn.detect.blind import BlindBaseline, blind_baseline
from unlearn.detect.conformal import length_matched, p_values
from unlearn.detect.dataset_test import DatasetTest, dataset_test
from unlearn.detect.decisions import Decisions, from_p_values
from unlearn.detect.engine import TextScorer
from unlearn.detect.references import References
from unlearn.detect.text import ScoredText, Text
from unlearn.detect.verdict import LIMITS, of_text, of_texts

PRIMARY = ("minkpp", "mink", "loss")
"""The score that decides when none is named: the first of these that was computed."""


@dataclass(frozen=True)
class Judgement:
    """What was found about many texts: their scores, the calls, and what makes them doubtful."""

    scored: list[ScoredText]
    decisions: Decisions
    blind: BlindBaseline
    references: References
    dataset: DatasetTest | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Give one record per text, in the order of the texts."""
        fpr = self.decisions.fpr
        called = zip(self.scored, self.decisions.rows(), self.decisions.deciding, strict=True)
        return [
            one.as_json() | row | {"words": of_text(float(p), fpr=fpr)} for one, row, p in called
        ]

    def summary(self) -> dict[str, Any]:
        """Give what holds for all texts together."""
        found = self.decisions
        return {
            "primary": found.primary,
            "fpr": found.fpr,
            "fdr": found.fdr,
            "references": int(found.references.max(initial=0)),
            "called": int(found.member.sum()),
            "hold_up": int(found.listed.sum()),
            "dataset_test": self.dataset.to_dict() if self.dataset else None,
            "checks": self.blind.to_dict(),
            "verdict": of_texts(found),
            "limits": list(LIMITS),
        }


def judge(
    scorer: TextScorer,
    texts: Sequence[Text],
    nonmembers: Sequence[str],
    *,
    primary: str | None = None,
    fpr: float = 0.05,
    fdr: float = 0.1,
    match_length: bool = True,
) -> Judgement:
    """Compare texts with ``nonmembers``, score by score; see :func:`~.decisions.decide`.

    ``primary`` decides; None takes the first of :data:`PRIMARY` that there is. With
    ``match_length`` references are cut to each text's own length; those that are shorter do not
    count for it.

    Raises:
        NotCalibrated: too few references for ``fpr``.
        UserError: ``primary`` was not computed, nothing can be scored.
    """
    references = References.of(scorer, nonmembers)
    scored = list(scorer(texts))
    names = references.columns
    primary = primary or next((name for name in PRIMARY if name in names), names[0])
    values = {name: _values(scored, name) for name in names}
    tokens = np.array([one.num_tokens for one in scored])
    if match_length:
        p, used = _matched(values, tokens, references)
    else:
        p = {name: p_values(values[name], references.at()[name]) for name in names}
        used = np.full(len(scored), len(references.encoded))
    decisions = from_p_values(p, used, primary=primary, fpr=fpr, fdr=fdr)
    blind = blind_baseline([one.text for one in texts], nonmembers, seed=scorer.settings.seed)
    return Judgement(scored, decisions, blind, references)


def with_dataset_test(found: Judgement) -> Judgement:
    """Also test all texts together, as one set, against the references.

    Raises:
        NotCalibrated: fewer than 20 texts on a side.
    """
    values = {name: _values(found.scored, name) for name in found.references.columns}
    seed = found.references.scorer.settings.seed
    return replace(found, dataset=dataset_test(values, found.references.at(), seed=seed))


def _values(scored: Sequence[ScoredText], name: str) -> ndarray:
    values = [one.scores[name] for one in scored]
    return np.array([np.nan if value is None else value for value in values])


def _matched(
    values: dict[str, ndarray], tokens: ndarray, references: References
) -> tuple[dict[str, ndarray], ndarray]:
    found, used = {}, np.zeros(tokens.size, int)
    for name, column in values.items():

        def at(length: int, name: str = name) -> ndarray:
            return references.at(length)[name]

        found[name], used = length_matched(column, tokens, at)
    return found, used
