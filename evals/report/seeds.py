"""A table over seeds: per recipe the mean of each headline measure and its 95 % t interval."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unlearn.evals.report.compare import Estimate, Group, grouped, references, t_interval
from unlearn.evals.report.folders import Found
from unlearn.evals.report.table import finite, number, table


@dataclass(frozen=True)
class Column:
    """A measure: the first of these metrics that any run has."""

    title: str
    metrics: tuple[str, ...]
    direction: str


COLUMNS = (
    Column("Forget probability", ("forget_Q_A_Prob",), "lower"),
    Column("Extraction strength", ("extraction_strength", "forget_extraction_strength"), "lower"),
    Column("Truth ratio", ("forget_truth_ratio",), "higher"),
    Column("Forget quality, log10 p", ("forget_quality_log10_p",), "higher"),
    Column("Model utility", ("model_utility",), "higher"),
    Column("Retain probability", ("retain_Q_A_Prob",), "higher"),
    Column("Retain KL, nats", ("retain_kl",), "lower"),
    Column("Training, s", ("seconds",), "none"),
)
ARROWS = {"lower": " ↓", "higher": " ↑"}
NOTE = "Mean over seeds ± half of its 95 % t interval; one seed has no interval."
ABOUT = {
    "retain_kl": "Retain KL is KL(start || model) per labelled retain token.",
    "seconds": "Seconds are those of training alone.",
}
"""What a reader must know of some columns, where they are there."""


def seed_table(found: Sequence[Found]) -> dict[str, Any]:
    """Give columns, one row per recipe, and the starting and retain models, as plain values."""
    tables = [{row.name: row for row in table(one.results)} for one in found]
    rows = grouped(found, tables)
    had = {name for rows in tables for name in rows} | {"seconds"}
    if "model_utility" in had:
        had.discard("retain_Q_A_Prob")  # one of its nine parts
    columns = [
        {"title": column.title, "metric": metric, "direction": column.direction}
        for column in COLUMNS
        if (metric := next((name for name in column.metrics if name in had), None))
    ]
    metrics = [column["metric"] for column in columns]
    return {
        "columns": columns,
        "rows": [_row(group, metrics) for group in rows],
        "references": list(references(rows, metrics)),
        "note": " ".join([NOTE, *(ABOUT[name] for name in metrics if name in ABOUT)]),
    }


def _row(group: Group, metrics: Sequence[str]) -> dict[str, Any]:
    estimates = {name: _estimate(group, name) for name in metrics}
    return {
        "name": group.name,
        "n": len(group.members),
        "runs": [member.name for member in group.members],
        "values": {name: found and asdict(found) for name, found in estimates.items()},
    }


def _estimate(group: Group, metric: str) -> Estimate | None:
    if metric != "seconds":
        return group.estimate(metric)
    values = [
        finite((member.results.get("training") or {}).get("seconds")) for member in group.members
    ]
    known = [value for value in values if value is not None]
    return t_interval(known) if known and len(known) == len(values) else None


def cell_text(row: Mapping[str, Any], metric: str, separator: str = " ± ") -> str:
    """Write a mean and half of its interval; a dash where nothing was measured."""
    estimate = row["values"].get(metric)
    if estimate is None:
        return "–"
    write = _seconds if metric == "seconds" else number
    if estimate["high"] is None:
        return write(estimate["mean"])
    return f"{write(estimate['mean'])}{separator}{write(estimate['high'] - estimate['mean'])}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def to_markdown(found: Mapping[str, Any], command: str) -> str:
    """Write the table as Markdown, after the command that made it."""
    titles = [f"{one['title']}{ARROWS.get(one['direction'], '')}" for one in found["columns"]]
    lines = [
        f"| | Seeds | {' | '.join(titles)} |",
        f"|:--|--:|{'--:|' * len(titles)}",
        *(_line(row, found["columns"], str(row["n"])) for row in found["rows"]),
        *(_line(row, found["columns"], "–") for row in found["references"]),
    ]
    return f"```sh\n{command}\n```\n\n" + "\n".join(lines) + f"\n\n{found['note']}\n"


def _line(row: Mapping[str, Any], columns: Sequence[Mapping[str, str]], seeds: str) -> str:
    name = str(row["name"]).replace("|", "\\|")
    cells = [cell_text(row, one["metric"]) for one in columns]
    return f"| {name} | {seeds} | {' | '.join(cells)} |"
