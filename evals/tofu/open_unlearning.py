"""open-unlearning's evaluation files: its metrics as our records, and our results as its metrics.

``TOFU_EVAL.json`` is an object keyed by metric. A metric with rows is ``{"agg_value": mean,
"value_by_index": {"0": {field: value}, …}}``, rows in dataset order, keys as strings; a membership
attack has a ``forget`` and a ``holdout`` side and the ``auc`` between them; the others are
``{"agg_value": value}``. ``TOFU_SUMMARY.json`` is ``{metric: agg_value}``.
Format: locuslab/open-unlearning at d3d7cf9, ``src/evals``.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unlearn.evals.benchmark import Direction, Metric, Record, Result
from unlearn.evals.statistics import truth_ratio
from unlearn.evals.tofu.records import Reading, metrics_of

SPLITS = ("forget", "retain", "ra", "wf")
"""Our names and open-unlearning's: ``ra`` are real authors, ``wf`` world facts."""

ROUGE = {
    "rouge1_recall": "rouge1_recall",
    "rougeL_f1": "rouge_l_f1",
    "rougeL_recall": "rouge_l_recall",
    "input": "question",
    "ground_truth": "answer",
    "generation": "generation",
}
MEASURES: dict[str, dict[str, str]] = {
    "Q_A_Prob": {"prob": "prob", "avg_loss": "avg_loss"},
    "Q_A_Prob_normalised": {"prob": "prob_normalised"},
    "Q_A_PARA_Prob": {"prob": "para_prob", "avg_loss": "para_loss"},
    "Q_A_PERT_Prob": {"prob": "pert_prob", "avg_loss": "pert_loss"},
    "Q_A_ROUGE": ROUGE,
    "Q_A_PARA_ROUGE": {"rougeL_recall": "para_rouge_l_recall"},
    "Q_A_PERT_ROUGE": {"rougeL_recall": "pert_rouge_l_recall"},
    "Truth_Ratio": {"score": "truth_ratio"},
}
"""A split's metric -> what each row holds there -> the field of our records it is."""

FORGET_ONLY: dict[str, dict[str, str]] = {
    "extraction_strength": {"score": "extraction_strength"},
    "exact_memorization": {"score": "exact_memorization"},
}
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradnorm")
MEANT = ("rougeL_recall", "prob", "score")
"""The field whose mean is the metric: the first of these that its rows have."""

SUMMARY = (
    "extraction_strength",
    "forget_Q_A_Prob",
    "forget_Q_A_ROUGE",
    "forget_quality",
    "forget_truth_ratio",
    "model_utility",
    "privleak",
)
"""What open-unlearning's TOFU configuration asks for; the rest is computed on the way."""


@dataclass(frozen=True)
class Place:
    """Where a metric with rows belongs: its split and what its rows hold."""

    split: str
    fields: Mapping[str, str]


def places() -> dict[str, Place]:
    """Give every metric with one value per row of one split, by open-unlearning's name."""
    found = {metric: Place("forget", fields) for metric, fields in FORGET_ONLY.items()}
    for split in SPLITS:
        for measure, fields in MEASURES.items():
            found[metric_name(split, measure)] = Place(split, fields)
    return found


def metric_name(split: str, measure: str) -> str:
    """Name a split's metric as open-unlearning does, exceptions included."""
    if (split, measure) == ("forget", "Truth_Ratio"):
        return "forget_truth_ratio"
    return f"{split}_{measure}"


def from_open_unlearning(tree: Mapping[str, Any]) -> list[Record]:
    """Turn the rows of a ``TOFU_EVAL.json`` into our records, one per row and split."""
    records: dict[tuple[str, int], Record] = {}
    for metric, place in places().items():
        for row, values in _rows(tree.get(metric)):
            record = records.setdefault(
                (place.split, row), {"split": place.split, "row": row, "question": None}
            )
            record |= {ours: values[its] for its, ours in place.fields.items() if its in values}
    for attack in ATTACKS:
        for split in ("forget", "holdout"):
            side = (tree.get(f"mia_{attack}") or {}).get(split)
            for row, values in _rows(side):
                record = records.setdefault((split, row), {"split": split, "row": row})
                record[f"mia_{attack}"] = values.get("score")
    order = {split: place for place, split in enumerate((*SPLITS, "holdout"))}
    return [records[key] for key in sorted(records, key=lambda key: (order[key[0]], key[1]))]


def _rows(metric: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    by_index = (metric or {}).get("value_by_index") or {}
    for row, values in by_index.items():
        if isinstance(values, Mapping):
            yield int(row), values


def to_open_unlearning(result: Result) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the contents of ``TOFU_EVAL.json`` and ``TOFU_SUMMARY.json``.

    Values that are no finite number become null there: JSON has no NaN. In the summary they are
    left out, as open-unlearning does. Truth ratios are always the geometric ones, which is what
    its readers take them for.
    """
    result = _geometric(result)
    found = {
        metric: _with_rows(metric, place, result)
        for metric, place in places().items()
        if any(_has(record, place) for record in result.records)
    }
    for attack in ATTACKS:
        if f"mia_{attack}" in result.metrics:
            found[f"mia_{attack}"] = _attack(f"mia_{attack}", result)
    for metric, value in result.values().items():
        if metric not in found and "/" not in metric:
            found[metric] = {"agg_value": value}
    ordered = {metric: found[metric] for metric in sorted(found)}
    values = {metric: ordered[metric]["agg_value"] for metric in SUMMARY if metric in ordered}
    return ordered, {metric: value for metric, value in values.items() if value is not None}


def _geometric(result: Result) -> Result:
    """Exchange truth ratios of another variant, and what follows from them, for geometric ones."""
    if result.settings.get("truth_ratio", "geometric") == "geometric":
        return result
    records = [dict(record) for record in result.records]
    for record in records:
        correct = record.get("para_loss", record.get("avg_loss"))
        if record.get("truth_ratio") is not None and correct is not None:
            record["truth_ratio"] = float(truth_ratio(correct, record["pert_loss"]))
    metrics = result.metrics | metrics_of(records, Reading())
    kept = {name: metric for name, metric in metrics.items() if "forget_quality" not in name}
    settings = {**result.settings, "truth_ratio": "geometric"}
    return replace(result, metrics=kept, records=records, settings=settings)


def _has(record: Mapping[str, Any], place: Place) -> bool:
    lead = next(iter(place.fields.values()))
    return record["split"] == place.split and lead in record


def _with_rows(metric: str, place: Place, result: Result) -> dict[str, Any]:
    rows = {
        str(record["row"]): {
            its: _plain(record[ours]) for its, ours in place.fields.items() if ours in record
        }
        for record in sorted(result.records, key=lambda record: record["row"])
        if _has(record, place)
    }
    if metric in result.metrics:
        return {"agg_value": _plain(result.metrics[metric].value), "value_by_index": rows}
    return {"agg_value": _mean(rows.values()), "value_by_index": rows}


def _mean(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Average the leading field over all rows, and over the answers within a row."""
    values: list[float] = []
    for row in rows:
        value = next(row[name] for name in MEANT if name in row)
        values += [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    return math.fsum(values) / len(values) if values else None


def _attack(metric: str, result: Result) -> dict[str, Any]:
    auc = _plain(result.metrics[metric].value)
    sides = {}
    for split in ("forget", "holdout"):
        rows = {
            str(record["row"]): {"score": _plain(record[metric])}
            for record in result.records
            if record["split"] == split and record.get(metric) is not None
        }
        if rows:
            sides[split] = {"agg_value": _mean(rows.values()), "value_by_index": rows}
    return sides | {"auc": auc, "agg_value": auc}


def _plain(value: Any) -> Any:
    """Turn NaN and infinities into null, also inside a list."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aggregates(tree: Mapping[str, Any], known: Sequence[str] = ()) -> dict[str, Metric]:
    """Give the ``agg_value`` of every metric that is not in ``known``; null and NaN are NaN."""
    rows = places()
    found = {}
    for name, metric in tree.items():
        if name in known or not isinstance(metric, Mapping) or "agg_value" not in metric:
            continue
        value = metric["agg_value"]
        number = float(value) if isinstance(value, int | float) else math.nan
        n = len(metric.get("value_by_index") or {}) if name in rows else 0
        found[name] = Metric(number, direction(name), None, n)
    return found


def direction(metric: str) -> Direction:
    """Say what is wanted of a metric after unlearning; ``none`` where nearness decides."""
    if metric == "forget_quality" or metric == "model_utility":
        return "higher"
    if metric.startswith(("mia_", "privleak")):
        return "none"
    if metric == "forget_truth_ratio":
        return "higher"
    if metric.startswith("forget_") or metric in FORGET_ONLY:
        return "lower"
    return "higher" if metric.startswith(SPLITS) and "PERT" not in metric else "none"
