"""Where numbers come from: settings, hashes, versions, time and memory, as names and texts."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from unlearn.evals.report.evidence import percent
from unlearn.evals.report.table import SPLITS, Row

Fact = tuple[str, str]

GROUPS = {
    "Run": ("run", "method", "recipe", "command", "seed", "status"),
    "Model": (
        *("model", "model_sha256", "weights_sha256", "model written", "retain_model", "models"),
        *("adapter", "tokenizer", "template", "dtype", "device"),
    ),
    "Data": (
        *("data", "data_sha256", "forget", "retain", "refusal", "retain_refusal", "alternate"),
        *("chosen", "rejected", "heldout"),
        *("holdout", "selection", "pairs", "text", "tasks"),
    ),
    "Versions": ("versions",),
    "Time and memory": (
        *("started", "finished", "took", "seconds", "first", "training", "evaluation"),
        *("peak_memory_bytes", "tokens"),
    ),
}
"""Heading -> facts that stand under it; what is named nowhere comes last."""


def provenance(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give every recorded fact under a heading; nested ones keep their path."""
    known = dict(_known(results))
    named = {key: title for title, keys in GROUPS.items() for key in keys}
    groups: dict[str, list[Fact]] = {title: [] for title in (*GROUPS, "Other")}
    order = [key for keys in GROUPS.values() for key in keys]
    for key in sorted(known, key=lambda key: order.index(key) if key in order else len(order)):
        groups[named.get(key, "Other")] += flat(known[key], key.replace("_", " "))
    settings = [
        fact for key, value in (results.get("settings") or {}).items() for fact in flat(value, key)
    ]
    groups["Settings of the measurements"] = settings
    return [{"title": title, "facts": facts} for title, facts in groups.items() if facts]


def _known(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    given = dict(results.get("provenance") or {})
    for name in ("run", "recipe"):
        if results.get(name):
            yield name, results[name]
    if results.get("model") and results["model"] != given.get("model"):
        yield "model written", results["model"]
    if took := duration(given.get("started"), given.get("finished")):
        yield "took", took
    if training := training_line(results.get("training") or {}):
        yield "training", training
    given.pop("training", None)
    yield from given.items()


def flat(value: Any, name: str) -> Iterator[Fact]:
    """Give a nested value as ``name key key: text``; what is null is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{name} · {key}")
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value, start=1):
            yield from flat(item, f"{name} · {number}")
    elif name.endswith("bytes") and isinstance(value, int):
        yield name.removesuffix("bytes").strip(" _"), f"{value / 2**20:,.0f} MiB"
    elif isinstance(value, list | tuple):
        yield name, ", ".join(str(item) for item in value)
    elif value is not None:
        yield name, str(value)


def duration(started: Any, finished: Any) -> str:
    """Give the time between two ISO dates in words, the pauses of a resumed run included."""
    try:
        passed = datetime.fromisoformat(str(finished)) - datetime.fromisoformat(str(started))
        seconds = int(passed.total_seconds())
    except (ValueError, TypeError):
        return ""
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def training_line(training: Mapping[str, Any]) -> str:
    """Give steps, time, tokens and memory in one line."""
    parts = []
    if training.get("steps") is not None:
        word = "step" if training["steps"] == 1 else "steps"
        kind = f"{word} of {training['edit']}" if training.get("edit") else f"optimiser {word}"
        parts.append(f"{training['steps']:,} {kind}")
    if training.get("seconds") is not None:
        parts.append(f"{training['seconds']:,.1f} s")
    if training.get("tokens") is not None:
        parts.append(f"{training['tokens']:,} tokens")
    if training.get("peak_memory_bytes") is not None:
        parts.append(f"peak memory {training['peak_memory_bytes'] / 2**20:,.0f} MiB")
    if training.get("changed_share") is not None:
        parts.append(f"{percent(training['changed_share'])} of the edited values changed as stored")
    return ", ".join(parts)


def repeat(recipe: str | None) -> str | None:
    """Give the command that repeats a run, in a new folder beside it."""
    if recipe is None:
        return None
    return shlex.join(["unlearn", "run", recipe, "--out", f"{Path(recipe).parent}-again"])


def selected(results: Mapping[str, Any]) -> str:
    """Say by which declared objective a step was chosen; empty when none was."""
    chosen = results.get("selected")
    if not chosen:
        return ""
    bounds = ", ".join(
        f"{name} {bound}" for name, bound in (chosen.get("constraints") or {}).items()
    )
    text = f"Step {chosen['step']} was kept: the best {chosen['metric']} of the measured steps"
    text += f" within {bounds}" if bounds else ""
    if chosen.get("satisfied") is False:
        text += "; no step met the constraints, this one misses them least"
    return f"{text}."


def chosen_part(provenance: Mapping[str, Any]) -> Iterator[str]:
    """Say which part of the forget set was trained on, when it was not all of it."""
    found = provenance.get("selection")
    if not isinstance(found, Mapping) or "rows" not in found:
        return
    by = found.get("by", "")
    rows, of = found["rows"], found.get("of", "?")
    text = f"Trained on {rows} of the {of} forget rows (selected: {by})"
    if found.get("labels") is not None:
        text += f", and in them on {found['labels']} tokens alone"
    if found.get("scaled_from") is not None:
        text += (
            f"; passed over {found['passes']:g} times instead of {found['scaled_from']:g}, so that "
            f"there are as many optimiser steps ({found['steps']}) as over all rows"
        )
    yield f"{text}. The whole forget set was measured."


def partial(rows: Sequence[Row], provenance: Mapping[str, Any]) -> Iterator[str]:
    """Say which sets were measured on their first rows only."""
    for split, name in SPLITS.items():
        source = provenance.get(split)
        given = source.get("rows") if isinstance(source, Mapping) else None
        used = max(
            (row.after.n or 0 for row in rows if row.split == split and row.after), default=0
        )
        if isinstance(given, int) and 0 < used < given:
            yield f"Only the first {used} of the {given} rows of the {name} were measured."
