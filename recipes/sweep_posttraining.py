"""What a sweep of post-training runs shows: columns of its table and panels of its curve."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from unlearn.evals.report.compare import grouped, references
from unlearn.evals.report.folders import Found
from unlearn.evals.report.seeds import Column, seed_table
from unlearn.evals.report.table import table

COLUMNS = (
    Column("Held-out loss", ("heldout_loss",), "lower"),
    Column("Pairs told apart", ("pairs_accuracy",), "higher"),
    Column("Margin", ("pairs_margin",), "higher"),
    Column("Chosen log-prob.", ("chosen_logp",), "higher"),
    Column("Rejected log-prob.", ("rejected_logp",), "none"),
    Column("Loss on text", ("text_loss",), "lower"),
    Column("Math pass@1", ("math_pass_at_1",), "higher"),
)
PANELS = (("heldout_loss", "text_loss"), ("pairs_accuracy",), ("math_pass_at_1",))
ABOUT = (
    "Losses, log-probabilities and the margin are in nats per token, all of the model after "
    "training; rows trained on say little about others."
)


def post_training_table(found: Sequence[Found]) -> dict[str, Any]:
    """Give the table over seeds of post-training runs, as :func:`seed_table` gives it.

    The columns are those of :data:`COLUMNS` that any run has, and then :func:`seed_table`'s own.
    """
    shown = seed_table(found)
    tables = [{row.name: row for row in table(one.results)} for one in found]
    groups = grouped(found, tables)
    columns = [
        {"title": column.title, "metric": name, "direction": column.direction}
        for column in COLUMNS
        for name in column.metrics
        if any(name in rows for rows in tables)
    ]
    for row, group in zip(shown["rows"], groups, strict=True):
        for column in columns:
            estimate = group.estimate(column["metric"])
            row["values"][column["metric"]] = estimate and asdict(estimate)
    shown["columns"] = [*columns, *shown["columns"]]
    names = [column["metric"] for column in shown["columns"]]
    shown["references"] = list(references(groups, names))
    shown["note"] = f"{shown['note']} {ABOUT}"
    return shown
