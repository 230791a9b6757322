"""Texts judged by a model next to texts it surely never saw: p-values, calls, words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray

from unlearn.detect.blind import BlindBaseline, blind_baseline
from unlearn.detect.conformal import (
    NotCalibrated,
    check_enough,
    length_matched,
    p_values,
    share_interval,
)
from unlearn.detect.dataset_test import DatasetTest, dataset_test
from unlearn.detect.decisions import Decisions, from_p_values
from unlearn.detect.engine import TextScorer
from unlearn.detect.references import References, comparable
from unlearn.detect.settings import Settings
from unlearn.detect.text import ScoredText, Text
from unlearn.detect.verdict import LIMITS, Share, of_members, of_text, of_texts
from unlearn.errors import UserError, unknown

PRIMARY = ("minkpp", "mink", "loss")
"""The score that decides when none is named: the first of these that was computed."""


@dataclass(frozen=True)
class Judgement:
    """What was found about many texts: their scores, the calls, and what makes them doubtful."""

    scored: list[ScoredText]
    decisions: Decisions
    blind: BlindBaseline
    references: References
    match_length: bool = True
    dataset: DatasetTest | None = None
    found_members: Share | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Give one record per text, in the order of the texts."""
        fpr = self.decisions.fpr
        called = zip(self.scored, self.decisions.rows(), self.decisions.deciding, strict=True)
        known = self.found_members is not None
        return [
            one.as_json() | row | {"words": of_text(float(p), fpr=fpr, known_members=known)}
            for one, row, p in called
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
            "known_members": vars(self.found_members) if self.found_members else None,
            "checks": self.blind.to_dict(),
            "verdict": [*of_texts(found), *of_members(self.found_members, found.fpr)],
            "limits": list(LIMITS),
        }


def check_request(
    settings: Settings, nonmembers: int, *, primary: str | None, fpr: float, fdr: float
) -> str:
    """Refuse what cannot be decided, before any model is loaded; give the score that decides.

    Raises:
        NotCalibrated: too few non-members for ``fpr``.
        UserError: a rate that is none, a score that is not computed or has no length to match.
    """
    names = comparable(settings)
    if not names:
        raise UserError(
            f"{', '.join(settings.scores)} cannot be compared with non-members here",
            "add one of loss, zlib, mink, minkpp, gapk and dcpdd",
        )
    if primary is not None and primary not in names:
        raise unknown("score", primary, names)
    check_enough(nonmembers, fpr)
    if not 0 < fdr < 1:
        raise UserError(f"fdr={fdr} is not a rate", "give more than 0 and less than 1, as 0.1")
    return primary or next((name for name in PRIMARY if name in names), names[0])


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
    primary = check_request(scorer.settings, len(nonmembers), primary=primary, fpr=fpr, fdr=fdr)
    references = References.of(scorer, nonmembers)
    scored = list(scorer(texts))
    p, used = _p_values(scored, references, match_length)
    decisions = from_p_values(p, used, primary=primary, fpr=fpr, fdr=fdr)
    blind = blind_baseline([one.text for one in texts], nonmembers, seed=scorer.settings.seed)
    return Judgement(scored, decisions, blind, references, match_length)


def with_members(found: Judgement, members: Sequence[Text]) -> Judgement:
    """Also judge texts that surely were seen: how many of such are found at this rate?

    Raises:
        NotCalibrated: none of them has enough references of its length.
    """
    scored = list(found.references.scorer(members))
    p, used = _p_values(scored, found.references, found.match_length)
    rules = {name: getattr(found.decisions, name) for name in ("primary", "fpr", "fdr")}
    called = from_p_values(p, used, **rules)
    judged = int((~np.isnan(called.deciding)).sum())
    hits = int(called.member.sum())
    if not judged:
        raise NotCalibrated("no known member could be judged", "give members of other lengths")
    return replace(found, found_members=Share(hits, judged, *share_interval(hits, judged)))


def with_dataset_test(found: Judgement) -> Judgement:
    """Also test all texts together, as one set, against the references.

    Raises:
        NotCalibrated: fewer than 20 texts on a side.
    """
    values = {name: _values(found.scored, name) for name in found.references.columns}
    seed = found.references.scorer.settings.seed
    return replace(found, dataset=dataset_test(values, found.references.at(), seed=seed))


def _values(scored: Sequence[ScoredText], name: str) -> ndarray:
    return np.array([one.scores[name] for one in scored], float)  # None becomes NaN


def _p_values(
    scored: Sequence[ScoredText], references: References, match_length: bool
) -> tuple[dict[str, ndarray], ndarray]:
    """Give p-values per score, and the number of references of every text."""
    values = {name: _values(scored, name) for name in references.columns}
    if not match_length:
        whole = references.at()
        p = {name: p_values(column, whole[name]) for name, column in values.items()}
        return p, np.full(len(scored), len(references.encoded))
    tokens = np.array([one.num_tokens for one in scored])
    found, used = {}, np.zeros(tokens.size, int)
    for name, column in values.items():

        def at(length: int, name: str = name) -> ndarray:
            return references.at(length)[name]

        found[name], used = length_matched(column, tokens, at)
    return found, used
