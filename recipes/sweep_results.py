"""What a sweep found: the table over seeds, the leaderboard, and a curve against a setting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.errors import UserError, unknown
from unlearn.evals.report.compare import compare
from unlearn.evals.report.folders import Found, open_folders
from unlearn.evals.report.leaderboard import write_comparison
from unlearn.evals.report.seeds import COLUMNS, seed_table
from unlearn.evals.report.sweep_curve import Measured, curve_of, draw_sweep_curve, is_number
from unlearn.evals.report.write import strict
from unlearn.recipes.sweep import RECORD, Cell, Sweep, method_of
from unlearn.recipes.sweep_posttraining import COLUMNS as POST_TRAINING
from unlearn.recipes.sweep_posttraining import PANELS as POST_TRAINING_PANELS
from unlearn.recipes.sweep_posttraining import post_training_table
from unlearn.recipes.sweep_run import Outcome
from unlearn.runs import command_line, write_atomic, write_json

FORMAT = "unlearn sweep 1"
CORESET = "data.select.fraction"
PANELS = (
    ("forget_Q_A_Prob",),
    ("model_utility", "retain_Q_A_Prob"),
    ("retain_kl",),
)
"""Metrics of the curve: of each, the first that was measured."""


def curve_setting(sweep: Sweep, curve: str | None) -> str | None:
    """Say against which setting curves are drawn; the part of the forget set unless one is named.

    Raises:
        UserError: the named one is not in the grid, or is no number.
    """
    if curve is None:
        return CORESET if CORESET in sweep.grid else None
    if curve not in sweep.grid:
        raise unknown("setting for --curve:", curve, sweep.grid)
    if not all(is_number(str(value)) for value in sweep.grid[curve]):
        raise UserError(f"'{curve}' has values that are no numbers", "a curve needs numbers")
    return curve


def described(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """List cells as plain values."""
    return [
        {
            "name": cell.name,
            "method": cell.recipe.method,
            "settings": dict(cell.settings),
            "seed": cell.seed,
            "state": cell.state,
            "run": str(cell.folder.path),
        }
        for cell in cells
    ]


def begin(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Write what is about to be run, so that the folder is known to be a sweep."""
    write_json(Path(sweep.out) / RECORD, _definition(sweep) | {"cells": described(cells)})


def _definition(sweep: Sweep) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "command": command_line(),
        "sweep": sweep.model_dump(mode="json"),
    }


def finish(sweep: Sweep, outcomes: Sequence[Outcome], *, curve: str | None) -> dict[str, Any]:
    """Write ``sweep.json``, the leaderboard and the curve; give what ``sweep.json`` holds."""
    out = Path(sweep.out)
    cells = described([outcome.cell for outcome in outcomes])
    for cell, outcome in zip(cells, outcomes, strict=True):
        cell["outcome"] = outcome.state
        if outcome.message:
            cell["message"] = outcome.message
    done = [outcome.cell for outcome in outcomes if outcome.state != "failed"]
    found = open_folders([cell.folder.path for cell in done])
    content = _definition(sweep) | {"cells": cells, "table": None, "not_ranked": "", "files": {}}
    if found and _posttrain(done):  # nothing is forgotten, so there is nothing to rank by
        content["table"] = post_training_table(found)
    elif found:
        content["table"] = seed_table(found)
        content["not_ranked"] = _leaderboard(out, found, content["files"])
    if found and curve:
        content["curve"] = _curve(out, curve, sweep, done, found, content["files"])
    content["files"]["json"] = str(out / RECORD)
    content = strict(content)
    write_json(out / RECORD, content)
    return dict(content)


def _posttrain(cells: Sequence[Cell]) -> bool:
    return all(cell.recipe.posttrains for cell in cells)


def _leaderboard(out: Path, found: Sequence[Found], files: dict[str, str]) -> str:
    """Write the leaderboard; say why there is none when the runs cannot be ranked."""
    try:
        comparison = compare(found)
    except UserError as error:
        return error.message
    write_comparison(out, comparison)
    files["leaderboard"] = str(out / "compare.html")
    return ""


def _curve(
    out: Path,
    setting: str,
    sweep: Sweep,
    cells: Sequence[Cell],
    found: Sequence[Found],
    files: dict[str, str],
) -> dict[str, Any]:
    runs = [
        Measured(_line(cell, setting, sweep), float(cell.settings[setting]), _after(one))
        for cell, one in zip(cells, found, strict=True)
    ]
    details = found[0].results["details"]["after"]
    metrics = [
        metric
        for several in (POST_TRAINING_PANELS if _posttrain(cells) else PANELS)
        if (metric := next((name for name in several if name in details), None))
    ]
    known = found[0].results["metrics"]
    references = {who: known[who] for who in ("before", "retain_model") if who in known}
    curve = curve_of(runs, setting, metrics, references)
    titles = {
        name: column.title for column in (*COLUMNS, *POST_TRAINING) for name in column.metrics
    }
    directions = {name: details[name]["direction"] for name in metrics}
    plot, png = draw_sweep_curve(curve, titles, directions)
    write_atomic(out / "curve.svg", plot.standalone())
    write_atomic(out / "curve.png", png)
    write_json(out / "curve.json", strict(curve))
    files["curve"] = str(out / "curve.png")
    return curve


def _after(found: Found) -> Mapping[str, Any]:
    after: Mapping[str, Any] = found.results["metrics"]["after"]
    return after


def _line(cell: Cell, setting: str, sweep: Sweep) -> str:
    """Name the line of a cell: what its neighbours differ in, apart from the setting and seed."""
    parts = [cell.recipe.method] if len(sweep.recipes) > 1 else []
    for key, value in cell.settings.items():
        if key != setting and len(sweep.grid[key]) > 1:
            last = key.rpartition(".")[2]
            parts.append(value if last == "by" else f"{last} {value}")
    return ", ".join(parts) or method_of(sweep.recipes[0])
