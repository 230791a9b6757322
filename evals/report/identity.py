"""What makes a run the same experiment as another: its settings, apart from the seed."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from unlearn.evals.report.folders import Found

FREE = ("seed", "out", "description", "source", "model.retain_model")
"""Settings that do not make another experiment."""

FREE_EVALS = ("evals.every", "evals.batch_tokens")
"""Nor do these, unless the best of the measured steps is kept."""

NONE = ("", "null", "~", None)


def identity(run: Found) -> dict[str, str]:
    """Give the settings of a run that another seed of it shares; empty without a recipe.

    Dotted paths and texts. Model and data count by their recorded hashes, so that it does not
    matter where they lay; a setting that is not set is left out.
    """
    if run.recipe is None:
        return {}
    settings = {key: _text(value) for key, value in flattened(run.recipe).items()}
    free = (
        FREE if any(key.startswith("evals.select_best") for key in settings) else FREE + FREE_EVALS
    )
    recorded = run.results.get("provenance") or {}
    hashes = {"model.path": recorded.get("model_sha256")}
    for name in ("forget", "retain"):
        source = recorded.get(name)
        hashes[f"data.{name}"] = source.get("sha256") if isinstance(source, Mapping) else None
    for key, value in hashes.items():
        if value and key in settings:
            settings[key] = str(value)
    return {key: value for key, value in settings.items() if key not in free and value not in NONE}


def differing(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """List the settings in which runs differ."""
    keys = dict.fromkeys(key for settings in runs for key in settings)
    return [key for key in keys if len({settings.get(key) for settings in runs}) > 1]


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """Give nested settings as dotted paths; a list of plain values stays one setting."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        items = [(str(place), item) for place, item in enumerate(value)]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flattened(item, f"{path}.{key}" if path else key)
    return found


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return os.path.normpath(text) if os.path.isabs(text) else text
