"""The report of a run: a page that needs nothing but itself, the same as Markdown, and the curve.

Everything a model wrote or a user named is untrusted text: it is escaped, and nothing in the page
can load or run anything.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from unlearn.evals.curve import draw_curve, standalone, themed
from unlearn.evals.overlap import Piece, shared_pieces
from unlearn.evals.verdict import SPLITS, Cell, Row, headline, number, verdict
from unlearn.runs import write_atomic

LONGEST = 1500
"""Characters of an answer that are shown; the run folder has the rest."""

COLUMNS = {"before": "Before", "after": "After", "retain_model": "Retain model"}
MEASURES = {
    "Q_A_Prob": ("Probability of the true answer", "per token, geometric mean"),
    "Q_A_ROUGE": ("Overlap of the written with the true answer", "ROUGE-L recall"),
    "extraction_strength": ("Extraction strength", "share of the answer recited to its end"),
}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!&]|:(?=//)|(?<=www)\.)")


@dataclass(frozen=True)
class Answer:
    """One column of a side-by-side example, cut into shared and other words."""

    who: str
    pieces: list[Piece]
    left_out: int


def write_report(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Write ``report.html``, ``report.md`` and, if there is a curve, ``curve.svg`` into a run."""
    curve = draw_curve(results.get("training", {}).get("curve") or [])
    if curve:
        write_atomic(run_dir / "curve.svg", standalone(curve))
    context = _context(results)
    write_atomic(run_dir / "report.md", _render("report.md.j2", context | {"curve": bool(curve)}))
    page = _render("report.html.j2", context | {"curve": themed(curve) if curve else None})
    write_atomic(run_dir / "report.html", page)


def printable(value: Any) -> str:
    """Replace what a page cannot show, or what would reorder the text around it."""
    return _UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n"))


def markdown(value: Any) -> str:
    """Escape text so that Markdown shows it as it is, on one line: no links, images or HTML."""
    return _MARKDOWN.sub(r"\\\1", printable(value)).replace("\n", " ↵ ")


def _render(name: str, context: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if hasattr(value, "__html__") else printable(value),
    )
    environment.filters |= {"number": number, "markdown": markdown}
    return environment.get_template(name).render(context)


def _context(results: Mapping[str, Any]) -> dict[str, Any]:
    rows = table(results)
    provenance = results.get("provenance", {})
    return {
        "method": results.get("method", ""),
        "model": _origin(results),
        "status": results.get("status", "unknown"),
        "finished": provenance.get("finished"),
        "headline": headline(rows),
        "verdict": verdict(rows),
        "groups": _groups(rows),
        "measures": MEASURES,
        "columns": {k: v for k, v in COLUMNS.items() if k != "retain_model" or _compared(rows)},
        "partial": _partial(rows, provenance),
        "examples": _examples(results.get("examples") or []),
        "training": _training(results.get("training", {})),
        "provenance": list(_provenance(results)),
        "repeat": _repeat(results.get("recipe")),
        "compared": _compared(rows),
    }


def _repeat(recipe: str | None) -> str | None:
    """Give the command that repeats a run, in a new folder beside it."""
    if recipe is None:
        return None
    return shlex.join(["unlearn", "run", recipe, "--out", f"{Path(recipe).parent}-again"])


def table(results: Mapping[str, Any]) -> list[Row]:
    """Line up the metrics of the models; a metric that some model lacks keeps an empty cell."""
    details: dict[str, dict[str, Any]] = {
        who: {
            name: {"value": value, **results.get("details", {}).get(who, {}).get(name, {})}
            for name, value in metrics.items()
        }
        for who, metrics in results.get("metrics", {}).items()
    }
    names = dict.fromkeys(name for who in COLUMNS for name in details.get(who, {}))
    rows = []
    for name in names:
        found = {who: details[who][name] for who in COLUMNS if name in details.get(who, {})}
        cells = {
            who: Cell(_finite(d["value"]), _finite(d.get("standard_error")), d.get("n"))
            for who, d in found.items()
        }
        direction = next((d["direction"] for d in found.values() if "direction" in d), "none")
        before, after, retain = (cells.get(who) for who in COLUMNS)
        rows.append(Row(name, direction, before, after, retain))
    return rows


def _finite(value: Any) -> float | None:
    usable = isinstance(value, int | float) and value == value and abs(value) != float("inf")
    return float(value) if usable else None


def _compared(rows: Sequence[Row]) -> bool:
    return any(row.retain_model is not None for row in rows)


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(SPLITS.get(row.split, "other").capitalize(), []).append(row)
    return groups


def _origin(results: Mapping[str, Any]) -> str:
    """Name the model that was changed; failing that, the one that came out."""
    return str(results.get("provenance", {}).get("model") or results.get("model") or "")


def _partial(rows: Sequence[Row], provenance: Mapping[str, Any]) -> list[str]:
    """Say which sets were measured on their first rows only."""
    notes = []
    for split, name in SPLITS.items():
        source = provenance.get(split)
        given = source.get("rows") if isinstance(source, Mapping) else None
        used = max(
            (row.after.n or 0 for row in rows if row.split == split and row.after), default=0
        )
        if isinstance(given, int) and 0 < used < given:
            notes.append(f"Only the first {used} of the {given} rows of the {name} were measured.")
    return notes


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "split": SPLITS.get(example["split"], example["split"]),
            "question": example["question"],
            "answer": example["answer"],
            "answers": [
                _answer(title, example["answer"], example[who])
                for who, title in COLUMNS.items()
                if example.get(who) is not None
            ],
        }
        for example in examples
    ]


def _answer(who: str, truth: str, text: str) -> Answer:
    return Answer(who, shared_pieces(truth, text[:LONGEST]), max(0, len(text) - LONGEST))


def _training(training: Mapping[str, Any]) -> str:
    """Give steps, time, tokens and memory in one line."""
    parts = []
    if training.get("steps") is not None:
        parts.append(f"{training['steps']:,} optimiser steps")
    if training.get("seconds") is not None:
        parts.append(f"{training['seconds']:,.1f} s")
    if training.get("tokens") is not None:
        parts.append(f"{training['tokens']:,} tokens")
    if training.get("peak_memory_bytes") is not None:
        parts.append(f"peak memory {training['peak_memory_bytes'] / 2**20:,.0f} MiB")
    return ", ".join(parts)


def _provenance(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give every recorded fact, nested ones joined on one line."""
    for name in ("run", "model", "recipe"):
        if results.get(name):
            yield {"model": "model written"}.get(name, name), str(results[name])
    for name, value in results.get("provenance", {}).items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        if value is not None:
            yield name.replace("_", " "), str(value)
