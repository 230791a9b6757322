"""Did unlearning take the forget set out of what the model finds familiar? Before and after."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from unlearn.detect.roc import Clusters, auc, auc_draws, interval
from unlearn.evals.membership import privleak

FORMAT = "detect-audit/1"
PRIVLEAK_SCORE = "mink_0.4"
"""The score that MUSE and open-unlearning take PrivLeak of."""
Flag = Literal["under_unlearned", "over_unlearned", "not_told_apart"]
Sides = Mapping[str, tuple[ArrayLike, ArrayLike]]
"""Score -> its values on the forget texts and on the holdout texts, in the same order per model."""
WORDS = {
    "under_unlearned": "under-unlearned: the forget texts are still more familiar than unseen ones",
    "over_unlearned": "over-unlearned: the forget texts are less familiar than unseen ones, which "
    "gives them away as well",
    "not_told_apart": "not told apart from unseen texts by this score",
}


def audit(
    before: Sides,
    after: Sides,
    retain: Sides | None = None,
    *,
    clusters: Clusters | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Compare how familiar the forget texts are to a model before and after unlearning.

    Per score: the AUC of forget against holdout texts (1: told apart perfectly, 0.5: not at all)
    for every model, with intervals; the paired change; PrivLeak; and a flag. ``retain`` is a model
    that never saw the forget texts: where it stands is the aim, for forget and holdout texts may
    differ in themselves. Without it the aim is 0.5. ``clusters`` names what each forget and each
    holdout text shares with others, as an author: such texts are resampled together.
    """
    return {
        name: _one_score(
            {"before": before[name], "after": after[name]}
            | ({"retain_model": retain[name]} if retain and name in retain else {}),
            clusters,
            seed,
        )
        for name in before
        if name in after
    }


def _one_score(
    models: Mapping[str, tuple[ArrayLike, ArrayLike]], clusters: Clusters | None, seed: int
) -> dict[str, Any]:
    kept, clusters = _finite(models, clusters)
    draws = {
        who: auc_draws(members=f, nonmembers=h, clusters=clusters, seed=seed)
        for who, (f, h) in kept.items()
    }
    found: dict[str, Any] = {
        who: _estimate(auc(holdout, forget), draws[who]) for who, (forget, holdout) in kept.items()
    }
    aim = found["retain_model"]["value"] if "retain_model" in found else 0.5
    after = found["after"]
    change = after["value"] - found["before"]["value"]
    forget, holdout = kept["after"]
    return {
        "auc": found,
        "change": _estimate(change, draws["after"] - draws["before"]),
        "privleak": {who: privleak(found[who]["value"], aim) for who in ("before", "after")},
        "aim": aim,
        "flag": flag(after["low"], after["high"], aim),
        "forget": len(forget),
        "holdout": len(holdout),
    }


def flag(low: float, high: float, aim: float) -> Flag:
    """Say on which side of the aim the AUC's whole interval lies."""
    if low > aim:
        return "under_unlearned"
    return "over_unlearned" if high < aim else "not_told_apart"


def _finite(
    models: Mapping[str, tuple[ArrayLike, ArrayLike]], clusters: Clusters | None
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], Clusters | None]:
    """Keep the texts that every model gives a score, so that all are asked about the same ones."""
    parts, names = [], []
    for side in (0, 1):
        table = np.array([np.asarray(values[side], float) for values in models.values()])
        there = np.isfinite(table).all(0)
        parts.append(table[:, there])
        names.append(np.asarray(clusters[side])[there].tolist() if clusters else [])
    kept = {who: (parts[0][place], parts[1][place]) for place, who in enumerate(models)}
    return kept, (names[0], names[1]) if clusters else None


def _estimate(value: float, draws: np.ndarray) -> dict[str, float]:
    low, high = interval(draws)
    return {"value": value, "low": low, "high": high}


def verdict(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say in words what the audit shows, score by score, and what it cannot show."""
    lines = []
    for name, one in found.items():
        before, after = one["auc"]["before"]["value"], one["auc"]["after"]["value"]
        lines.append(f"{name}: AUC {before:.3f} before, {after:.3f} after; {WORDS[one['flag']]}.")
    lines.append(
        "Texts that these scores do not tell apart may still be recited or be extracted in other "
        "ways; see the other measures."
    )
    return lines


def sides_of(
    rows: Sequence[Mapping[str, float | None]], forget: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Turn rows of scores, the first ``forget`` of them of the forget set, into sides per score.

    A score that a text has not is NaN.
    """
    columns = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
    return {name: (column[:forget], column[forget:]) for name, column in columns.items()}
