"""TOFU's own evaluation log, ``eval_log_aggregated.json``, as our records.

An object with one block per split; a block holds columns (``avg_gt_loss``, ``average_perturb_loss``
…) keyed by row. Losses are nats per token. The ``truth_ratio`` column is not read: it is the
inverse of the ratio used everywhere else, and follows from the losses.
Format: locuslab/tofu, ``evaluate_util.py`` and ``aggregate_eval_stat.py``.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from unlearn.errors import UserError
from unlearn.evals.benchmark import Record

BLOCKS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "ra": "eval_real_author_wo_options.json",
    "wf": "eval_real_world_wo_options.json",
}
"""The block of each split: the forget set, the retain set, real authors and world facts."""

COLUMNS = {
    "avg_loss": "avg_gt_loss",
    "para_loss": "avg_paraphrased_loss",
    "pert_loss": "average_perturb_loss",
    "rouge1_recall": "rouge1_recall",
    "rouge_l_recall": "rougeL_recall",
    "num_tokens": "num_token_gt",
}
"""Field of our records -> column."""
AGAIN = "evaluate that model again"


def from_tofu(tree: Mapping[str, Any], source: str) -> list[Record]:
    """Turn an aggregated log into records, one per row and split.

    Raises:
        UserError: a block or column is damaged, or a loss is not a finite number.
    """
    return [
        record
        for split, block in BLOCKS.items()
        if block in tree
        for record in _block(tree[block], split, f"'{source}' {block}")
    ]


def _block(columns: Any, split: str, where: str) -> Iterator[Record]:
    if not isinstance(columns, Mapping) or not isinstance(columns.get("avg_gt_loss"), Mapping):
        raise UserError(f"{where} has no column avg_gt_loss", AGAIN)
    for index in sorted(columns["avg_gt_loss"], key=int):
        row = {
            ours: columns[its].get(index)
            for ours, its in COLUMNS.items()
            if isinstance(columns.get(its), Mapping)
        }
        texts = columns.get("generated_text", {}).get(index) or (None, None, None)
        names = zip(("question", "generation", "answer"), texts, strict=True)
        yield {"split": split, "row": int(index), **dict(names), **row} | _probabilities(
            row, split, f"{where} row {index}"
        )


def _probabilities(row: Mapping[str, Any], split: str, where: str) -> Record:
    """Give per-token probabilities of the answers; among real authors also against the wrong ones.

    ``prob_normalised`` is p / (p + the wrong answers' sum), without open-unlearning's 1e-10.
    """
    found: Record = {}
    for name in ("avg", "para"):
        if row.get(f"{name}_loss") is not None:
            found[f"{name}_prob"] = math.exp(-loss(row[f"{name}_loss"], where))
    found["prob"] = found.pop("avg_prob")
    if row.get("pert_loss") is not None:
        found["pert_prob"] = [math.exp(-loss(value, where)) for value in row["pert_loss"]]
        if split in ("ra", "wf"):
            together = found["prob"] + math.fsum(found["pert_prob"])
            found["prob_normalised"] = found["prob"] / together if together else 0.0
    return found


def loss(value: Any, where: str) -> float:
    """Check that a logged loss is a finite number.

    Raises:
        UserError: it is NaN, infinite or no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} has a loss that is not a finite number ({value})", AGAIN)
    return float(value)
