"""How well every score tells members from non-members, on texts whose membership is known."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlearn.detect.blind import blind_baseline, later_years
from unlearn.detect.engine import TextScorer
from unlearn.detect.roc import Roc, auc, auc_draws, interval, roc, separation
from unlearn.detect.text import Text
from unlearn.errors import UserError
from unlearn.evals.detection.labelled import LabelledText
from unlearn.evals.detection.stored import stored_blocks

FORMAT = "detect-bench/1"
NOT_RANKED = ("ppl",)
"""Scores for display only: perplexity ranks as the loss does, the other way round."""
LENGTHS = (32, 64, 128, 256)
"""Bounds of the groups by scored tokens, for data without groups of its own."""
UNLIKELY = 0.4
"""AUC below which, interval and all, members are hardly members."""
FEWEST = 10
"""Texts per side from which a group gets figures."""
Progress = Callable[[int], None]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """A labelled text with its scores; a score that could not be computed is None."""

    text: LabelledText
    num_tokens: int
    status: str
    scores: Mapping[str, float | None]

    def as_json(self) -> dict[str, Any]:
        """Give the row that is stored; the text is left out."""
        return {
            "label": int(self.text.member),
            "group": self.text.group,
            "n_tokens": self.num_tokens,
            "status": self.status,
            "scores": dict(self.scores),
        }


def score_labelled(
    texts: Sequence[LabelledText],
    scorer: TextScorer,
    *,
    folder: Path | None = None,
    progress: Progress = lambda done: None,
) -> list[Scored]:
    """Score labelled texts in their order; ``folder`` keeps the scores (:mod:`.stored`).

    Raises:
        UserError: no text of one side has a score.
    """
    stream = [Text(place, text.text) for place, text in enumerate(texts)]
    found: list[Scored] = []
    for block in stored_blocks(scorer, stream, folder):
        for row in block:
            found.append(Scored(texts[len(found)], row["n_tokens"], row["status"], row["scores"]))
        progress(len(found))
    for member, kind in ((True, "member"), (False, "non-member")):
        if not any(one.text.member == member and _has_score(one) for one in found):
            raise UserError(f"no {kind} has a token to score", "give longer texts")
    return found


def _has_score(one: Scored) -> bool:
    return one.status in ("ok", "short")


def ranked(found: Sequence[Scored]) -> list[str]:
    """Name the scores that are compared, in their order."""
    return [name for name in found[0].scores if name not in NOT_RANKED]


def sides(found: Iterable[Scored], score: str) -> tuple[Array, Array]:
    """Give the scores of members and of non-members; texts without one are left out."""
    rows = [(one.text.member, one.scores.get(score)) for one in found]
    members = [value for member, value in rows if member and value is not None]
    others = [value for member, value in rows if not member and value is not None]
    return np.array(members, float), np.array(others, float)


def measure(found: Sequence[Scored], *, seed: int = 0, year: int | None = None) -> dict[str, Any]:
    """Measure every score: AUC, TPR at fixed FPR, FPR at 95 % TPR, with 95 % intervals.

    Also per group (or per length in tokens), the paired difference of every score to the loss, and
    what can be told without the model (:func:`~unlearn.detect.blind.blind_baseline`). ``year``: the
    model's; texts that name a later one are counted.
    """
    chosen = ranked(found)
    metrics = {name: _separation(found, name, seed) for name in chosen}
    sizes = Counter(one.text.member for one in found)
    missing = Counter(one.status for one in found if not _has_score(one))
    return {
        "schema": FORMAT,
        "members": sizes[True],
        "nonmembers": sizes[False],
        "left_out": dict(missing),
        "short": sum(one.status == "short" for one in found),
        "metrics": metrics,
        "differences": dict(_differences(found, chosen, seed)),
        "groups": [_group(name, some, chosen, seed) for name, some in groups(found)],
        "checks": checks(found, metrics, seed=seed, year=year),
        "clusters": len({(one.text.member, one.text.cluster) for one in found})
        if any(one.text.cluster for one in found)
        else None,
        "seed": seed,
    }


def checks(
    found: Sequence[Scored],
    metrics: Mapping[str, Mapping[str, Any] | None] | None = None,
    *,
    seed: int = 0,
    year: int | None = None,
) -> dict[str, Any]:
    """Say what makes the figures doubtful: what words alone tell, late years, swapped labels.

    ``metrics`` are those of :func:`measure`, which are worked out when they are not given.
    """
    if metrics is None:
        metrics = {name: _separation(found, name, seed) for name in ranked(found)}
    texts = {member: [one.text.text for one in found if one.text.member == member] for member in
             (True, False)}  # fmt: skip
    blind = blind_baseline(texts[True], texts[False], seed=seed)
    return blind.to_dict() | {
        "warnings": [*blind.warnings, *_years(texts, year), *swapped(metrics)]
    }


def swapped(metrics: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """Say that members score lower than non-members, and by every score: are the labels swapped?"""
    aucs = [one["auc"] for one in metrics.values() if one]
    if not aucs or any(one["high"] >= UNLIKELY for one in aucs):
        return []
    return [
        f"members score lower than non-members (AUC at most {max(one['value'] for one in aucs):.2f}"
        "): are the labels the wrong way round? Only a model that was made to forget does this"
    ]


def _separation(found: Sequence[Scored], score: str, seed: int) -> dict[str, Any] | None:
    members, nonmembers = sides(found, score)
    if not members.size or not nonmembers.size:
        return None
    clusters = _clusters(found, score)
    return separation(
        members=members, nonmembers=nonmembers, clusters=clusters, seed=seed
    ).to_dict()


def clusters_of(texts: Sequence[LabelledText]) -> tuple[list[str], list[str]] | None:
    """Give the clusters of members and of non-members; None when no text has one."""
    if not any(text.cluster for text in texts):
        return None
    sides = ([text.cluster for text in texts if text.member == member] for member in (True, False))
    return next(sides), next(sides)


def _clusters(found: Sequence[Scored], score: str) -> tuple[list[str], list[str]] | None:
    """Give the clusters of the texts behind :func:`sides`; None without clusters."""
    return clusters_of([one.text for one in found if one.scores.get(score) is not None])


def _differences(
    found: Sequence[Scored], names: Sequence[str], seed: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Compare every score with the loss on the texts that have both, resampled together."""
    for name in names if "loss" in names else ():
        both = [one for one in found if None not in (one.scores[name], one.scores["loss"])]
        ours, theirs = sides(both, name), sides(both, "loss")
        if name == "loss" or not ours[0].size or not ours[1].size:
            continue
        clusters = _clusters(both, name)
        draws = [
            auc_draws(members=yes, nonmembers=no, clusters=clusters, seed=seed)
            for yes, no in (ours, theirs)
        ]
        low, high = interval(draws[0] - draws[1])
        value = auc(ours[1], ours[0]) - auc(theirs[1], theirs[0])
        yield name, {"value": value, "low": low, "high": high}


def groups(found: Sequence[Scored]) -> list[tuple[str, list[Scored]]]:
    """Part texts by the benchmark's own groups, else by their number of scored tokens."""
    if any(one.text.group for one in found):
        names = list(dict.fromkeys(one.text.group for one in found))
        return [(name, [one for one in found if one.text.group == name]) for name in names]
    bounds = (0, *LENGTHS, math.inf)
    parts = []
    for low, high in pairwise(bounds):
        some = [one for one in found if _has_score(one) and low <= one.num_tokens < high]
        name = f"under {high} tokens" if not low else f"{low} tokens and more"
        if low and high < math.inf:
            name = f"{low} to {int(high) - 1} tokens"
        parts.append((name, some))
    return [(name, some) for name, some in parts if some]


def _group(name: str, some: Sequence[Scored], names: Sequence[str], seed: int) -> dict[str, Any]:
    sizes = Counter(one.text.member for one in some)
    few = min(sizes[True], sizes[False]) < FEWEST
    return {
        "group": name,
        "members": sizes[True],
        "nonmembers": sizes[False],
        "metrics": None if few else {score: _separation(some, score, seed) for score in names},
    }


def _years(texts: Mapping[bool, Sequence[str]], year: int | None) -> Iterator[str]:
    if year is None:
        return
    for member, kind in ((True, "members"), (False, "non-members")):
        share = later_years(texts[member], year)
        if share:
            yield f"{100 * share:.1f} % of the {kind} name a year after {year}"


def curves(found: Sequence[Scored]) -> dict[str, Roc]:
    """Give the ROC curve of every score, for the plot."""
    parted = {name: sides(found, name) for name in ranked(found)}
    return {
        name: roc(members=members, nonmembers=nonmembers)
        for name, (members, nonmembers) in parted.items()
        if members.size and nonmembers.size
    }
