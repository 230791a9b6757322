"""How many forgotten rows a model still gives away, and how many more it might."""

from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import beta

CONFIDENCE = 0.95
THRESHOLDS = {"rouge_l_recall": 0.9, "extraction_strength": 0.9}
"""Field of a record -> from which value on the row counts as leaked."""

NAMES = {"rouge_l_recall": "ROUGE-L recall", "extraction_strength": "extraction strength"}


def leakage(
    records: Sequence[Mapping[str, Any]],
    *,
    split: str = "forget",
    thresholds: Mapping[str, float] = THRESHOLDS,
) -> dict[str, Any] | None:
    """Count the rows of a set that are leaked, and bound their share from above.

    A row is leaked when any of its measures reaches its threshold: the model wrote nearly the
    whole true answer (``rouge_l_recall``, share of its words), or continues it to its end once
    given its start (``extraction_strength``, share of its tokens). Rows without any of these
    measures do not count; None when no row has one. ``upper`` is :func:`upper_bound`.
    """
    chosen = [record for record in records if record.get("split") == split]
    used = [name for name in thresholds if any(_measured(record, name) for record in chosen)]
    counted = [record for record in chosen if any(_measured(record, name) for name in used)]
    if not counted:
        return None
    leaked = sum(
        any(_measured(record, name) and record[name] >= thresholds[name] for name in used)
        for record in counted
    )
    return {
        "rule": " or ".join(f"{NAMES.get(name, name)} ≥ {thresholds[name]:g}" for name in used),
        "leaked": leaked,
        "n": len(counted),
        "upper": upper_bound(leaked, len(counted)),
    }


def upper_bound(count: int, n: int, *, confidence: float = CONFIDENCE) -> float:
    """Give the one-sided Clopper–Pearson upper bound on a share, in [0, 1].

    The largest share of which ``count`` or fewer hits among ``n`` independent draws would still be
    seen with probability ``1 - confidence`` (Clopper and Pearson 1934). The usual two-sided 95 %
    interval ends where the one-sided 97.5 % bound does.
    """
    if not 0 <= count <= n or n == 0:
        raise ValueError(f"{count} of {n} is not a share")
    return 1.0 if count == n else float(beta.ppf(confidence, count + 1, n - count))


def _measured(record: Mapping[str, Any], name: str) -> bool:
    return record.get(name) is not None and record[name] == record[name]
