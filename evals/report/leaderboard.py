"""Pages about several runs: the leaderboard alone, or with the report of every run under it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.evals.report.compare import compare, draw_comparison
from unlearn.evals.report.folders import Found
from unlearn.evals.report.page import render
from unlearn.evals.report.plots import Plot
from unlearn.evals.report.write import describe, draw, strict
from unlearn.runs import write_atomic, write_json


def write_comparison(folder: Path, comparison: Mapping[str, Any], *, stem: str = "compare") -> None:
    """Write ``compare.html``, ``.md``, ``.json`` and the plot (SVG) into a folder."""
    plot = draw_comparison(comparison)
    if plot:
        write_atomic(folder / f"{plot.name}.svg", plot.standalone())
    context = {
        "title": "Unlearning runs compared",
        "comparison": comparison,
        "front_plot": plot,
        "links": None,
    }
    write_atomic(folder / f"{stem}.html", render("compare.html.j2", context))
    write_atomic(folder / f"{stem}.md", render("compare.md.j2", context))
    write_json(folder / f"{stem}.json", strict(comparison))


def write_reports(folder: Path, found: Sequence[Found], *, stem: str = "report") -> dict[str, Any]:
    """Write one page, one Markdown and one JSON file about several runs, and all plots (SVG).

    The leaderboard comes first; runs that cannot be ranked are shown without one. Gives the
    content of the JSON file.
    """
    comparison, reason = _comparison(found)
    sections = [_section(one, number) for number, one in enumerate(found, start=1)]
    front = draw_comparison(comparison) if comparison else None
    plots = [(plot, prefix) for _, drawn, prefix in sections for plot in drawn.values()]
    for plot, prefix in [*plots, *([(front, "")] if front else [])]:
        write_atomic(folder / f"{prefix}{plot.name}.svg", plot.standalone())
    context = {
        "title": f"Unlearning report: {len(found)} runs",
        "runs": sections,
        "comparison": comparison,
        "not_ranked": reason,
        "front_plot": front,
        "links": {str(one.folder): number for number, one in enumerate(found, start=1)},
    }
    content = strict(
        {"leaderboard": comparison, "not_ranked": reason, "runs": [run for run, _, _ in sections]}
    )
    write_atomic(folder / f"{stem}.html", render("runs.html.j2", context))
    write_atomic(folder / f"{stem}.md", render("runs.md.j2", context))
    write_json(folder / f"{stem}.json", content)
    return dict(content)


def _comparison(found: Sequence[Found]) -> tuple[dict[str, Any] | None, str]:
    try:
        return compare(found), ""
    except UserError as error:
        return None, f"{error.message[:1].upper()}{error.message[1:]}."


def _section(one: Found, number: int) -> tuple[dict[str, Any], dict[str, Plot], str]:
    run = describe(one.results)
    run["name"] = f"{run['method']} · {one.name}" if run["method"] else one.name
    return run, draw(one.results, run), f"run{number}-"
