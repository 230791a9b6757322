"""The report of a run: one description of what was found, as a page, as Markdown and as JSON.

:func:`describe` gives plain values; the templates only lay them out, so the three say the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unlearn.evals.report.clamp import describe_clamp, draw_clamp
from unlearn.evals.report.curve import draw_curve
from unlearn.evals.report.ecdf import Distance, distances, draw_ecdf, usable_ratios
from unlearn.evals.report.edit_path import (
    FITTED,
    HELD_OUT,
    UNFITTED,
    caption,
    draw_edit_path,
)
from unlearn.evals.report.edit_steps import describe_edit, edit_steps, tried_scales
from unlearn.evals.report.evidence import evidence, leakage_note, leakage_rows, ratio_note, reading
from unlearn.evals.report.facts import (
    chosen_part,
    partial,
    provenance,
    repeat,
    selected,
    training_line,
)
from unlearn.evals.report.limits import limits
from unlearn.evals.report.overlap import shared_pieces
from unlearn.evals.report.page import render
from unlearn.evals.report.plots import Plot
from unlearn.evals.report.table import (
    COLUMNS,
    SPLITS,
    Cell,
    Row,
    blocks,
    columns,
    finite,
    is_post_training,
    table,
)
from unlearn.evals.report.tradeoff import draw_tradeoff, path_of
from unlearn.evals.report.verdict import Paragraph, headline, verdict
from unlearn.runs import write_atomic, write_json

FORMAT = "unlearn report 1"
LONGEST = 1500
"""Characters of an answer that are shown; the run folder has the rest."""

OPEN = 3
"""Examples of each set that stand open on the page."""


FINDINGS = (
    *("Forget set", "Forget quality", "Rows given away", "Membership"),
    *("Retain set", "Real authors", "World facts", "Model utility"),
    *("Held-out rows", "Pairs", "Chosen answers", "Rejected answers", "Rows trained on"),
    "Mathematical problems",
    "Distance from the retain model",
)
"""Headings of the paragraphs, in the order in which they are read."""


def write_report(
    folder: Path, results: Mapping[str, Any], *, stem: str = "report"
) -> dict[str, Any]:
    """Write ``report.html``, ``report.md``, ``report.json`` and the plots (SVG) into a folder.

    Gives the content of the JSON file.
    """
    run = describe(results)
    plots = draw(results, run)
    for plot in plots.values():
        write_atomic(folder / f"{plot.name}.svg", plot.standalone())
    context = {"run": run, "title": page_title(run)}
    shown = {"plots": plots, "prefix": "", "level": 2}
    write_atomic(folder / f"{stem}.html", render("report.html.j2", context | shown))
    write_atomic(folder / f"{stem}.md", render("report.md.j2", context | shown))
    content = strict(run)
    write_json(folder / f"{stem}.json", content)
    return dict(content)


def strict(value: Any) -> Any:
    """Give a value as JSON knows it: no NaN, no infinity, no half characters."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page_title(run: Mapping[str, Any]) -> str:
    """Name a report for the title bar."""
    return ": ".join(
        part
        for part in (run["heading"], ", ".join(filter(None, (run["method"], run["model"]))))
        if part
    )


def describe(results: Mapping[str, Any]) -> dict[str, Any]:
    """Give everything the report says about a run, as JSON knows it."""
    rows = table(results)
    titles = columns(rows)
    ratios = usable_ratios(results.get("truth_ratios") or {})
    apart = distances(ratios)
    ks = apart["after"].distance if "after" in apart else None
    leaked = leakage_rows(results.get("leakage") or {}, titles)
    recorded = results.get("provenance") or {}
    training = results.get("training") or {}
    return {
        "format": FORMAT,
        "heading": "Post-training report" if is_post_training(rows) else "Unlearning report",
        "run": str(results.get("run") or ""),
        "method": str(results.get("method") or ""),
        "model": origin(results),
        "status": str(results.get("status", "unknown")),
        "finished": recorded.get("finished"),
        "headline": headline(rows, ks),
        "findings": [asdict(paragraph) for paragraph in _findings(rows, ks, leaked)],
        "warnings": [str(text) for text in results.get("warnings") or []],
        "columns": titles,
        "blocks": [
            {"title": title, "rows": [_row(row) for row in chosen]}
            for title, chosen in blocks(rows).items()
        ],
        "notes": [*partial(rows, recorded), *chosen_part(recorded)],
        "truth_ratios": _ratios(results, ratios, apart, titles),
        "leakage": leaked,
        "leakage_note": leakage_note(leaked),
        "trade_off": _tradeoff(results, rows),
        "selected": selected(results),
        "training": training_line(training),
        "curve": training.get("curve") or [],
        "edit": _edit(results),
        "examples": _examples(results.get("examples") or [], titles),
        "limits": limits(rows, leakage=bool(leaked), clamped=bool(training.get("clamp"))),
        "reading": reading(rows),
        "provenance": provenance(results),
        "repeat": repeat(results.get("recipe")),
    }


def draw(results: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Plot]:
    """Draw what there is to draw, by what it is called in the templates."""
    path = path_of(results, _directions(table(results)))
    found = {
        "truth_ratios": draw_ecdf(usable_ratios(results.get("truth_ratios") or {}), run["columns"]),
        "trade_off": draw_tradeoff(path) if path else None,
        "curve": None if run["edit"] else draw_curve(run["curve"]),
        "edit_path": _edit_path(results.get("training") or {}),
        "clamp": draw_clamp(results.get("training") or {}),
    }
    return {name: plot for name, plot in found.items() if plot}


def _edit(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give the steps of an edit, and what their picture shows; None where nothing was edited."""
    training = results.get("training") or {}
    found, steps, tried = describe_edit(training), edit_steps(training), tried_scales(training)
    if found and steps:
        few = any("too few retain rows" in str(text) for text in results.get("warnings") or [])
        rows = UNFITTED if "trials" in training else FITTED if few else HELD_OUT
        found["caption"] = caption(steps, tried, rows)
    if found:
        found["clamp"] = describe_clamp(training)
    return found


def _edit_path(training: Mapping[str, Any]) -> Plot | None:
    if not training.get("edit") or training.get("clamp"):
        return None
    return draw_edit_path(edit_steps(training), tried_scales(training))


def origin(results: Mapping[str, Any]) -> str:
    """Name the model that was changed or measured; failing that, the one that came out."""
    recorded = (results.get("provenance") or {}).get("model")
    if isinstance(recorded, Mapping):
        recorded = recorded.get("path") or recorded.get("name")
    return str(recorded or results.get("model") or "")


def _findings(
    rows: Sequence[Row], ks: float | None, leaked: Sequence[Mapping[str, Any]]
) -> list[Paragraph]:
    """Order what is said: what was forgotten, what was kept, what an outsider could see."""
    found = [*verdict(rows), *evidence(rows, ks, leaked)]
    order = {heading: place for place, heading in enumerate(FINDINGS)}
    return sorted(found, key=lambda paragraph: order.get(paragraph.heading, len(order)))


def _directions(rows: Sequence[Row]) -> dict[str, str]:
    return {row.name: row.direction for row in rows}


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "title": row.title,
        "detail": row.detail,
        "direction": row.direction,
        "change": row.change,
        "cells": {who: _cell(row.cell(who)) for who in COLUMNS},
        "marks": _marks(row),
    }


def _cell(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else asdict(cell)


def _marks(row: Row) -> dict[str, float] | None:
    """Give the values for the scale from 0 to 1; None where that is not the scale."""
    values = {who: cell.value for who in COLUMNS if (cell := row.cell(who)) is not None}
    found = {who: value for who, value in values.items() if value is not None}
    on_scale = all(0 <= value <= 1 for value in found.values())
    return found if found and on_scale and row.name != "forget_quality" else None


def _ratios(
    results: Mapping[str, Any],
    ratios: Mapping[str, Sequence[float]],
    apart: Mapping[str, Distance],
    titles: Mapping[str, str],
) -> dict[str, Any] | None:
    if not ratios:
        return None
    dropped = sum(len(results["truth_ratios"][who]) - len(x) for who, x in ratios.items())
    return {
        "note": ratio_note(apart, titles, dropped=dropped),
        "n": {who: len(values) for who, values in ratios.items()},
        "distances": {
            who: asdict(found) | {"log10_p": finite(found.log10_p)} for who, found in apart.items()
        },
    }


def _tradeoff(results: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any] | None:
    path = path_of(results, _directions(rows))
    if path is None:
        return None
    ends = [path.start] if path.start else [], [path.retain_model] if path.retain_model else []
    points = [asdict(point) for point in (*ends[0], *path.steps, *ends[1])]
    return asdict(path) | {"points": points}


def _examples(
    examples: Sequence[Mapping[str, Any]], titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Group the examples by set, each answer cut into shared and other words."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        split = SPLITS.get(example["split"], example["split"])
        groups.setdefault(split, []).append(
            {
                "question": example["question"],
                "answer": example["answer"],
                "answers": [
                    _answer(titles.get(who, title), example["answer"], example[who])
                    for who, title in COLUMNS.items()
                    if example.get(who) is not None
                ],
            }
        )
    return [
        {"split": split, "open": chosen[:OPEN], "more": chosen[OPEN:]}
        for split, chosen in groups.items()
    ]


def _answer(who: str, truth: str, text: str) -> dict[str, Any]:
    pieces = [asdict(piece) for piece in shared_pieces(truth, text[:LONGEST])]
    return {"who": who, "pieces": pieces, "left_out": max(0, len(text) - LONGEST)}
