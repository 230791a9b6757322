"""Finished runs and evaluations on disk, read back for reports and comparisons."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unlearn.errors import UserError
from unlearn.evals.leakage import leakage

FINISHED = "give the --out folder of a finished run or evaluation"


@dataclass(frozen=True)
class Found:
    """A folder with results; ``recipe`` (values as text) is None without a run."""

    folder: Path
    results: dict[str, Any]
    recipe: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def open_folders(folders: Sequence[Path]) -> list[Found]:
    """Read several folders; one that is given twice counts once.

    Raises:
        UserError: one is not there, not complete or not readable.
    """
    given = [path.parent if path.name == "results.json" else path for path in folders]
    distinct = {folder.resolve(): folder for folder in reversed(given)}
    return [open_folder(folder) for folder in reversed(distinct.values())]


def open_folder(folder: Path) -> Found:
    """Read the results of a run folder or of an evaluation folder.

    Results that carry no leakage counts get them from the stored records, where there are any.

    Raises:
        UserError: it is not there, not complete or not readable.
    """
    if folder.name == "results.json" and folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'", "give the --out folder of a run or an evaluation")
    path = folder / "results.json"
    if not path.is_file():
        if (folder / "recipe.yaml").is_file():
            hint = f"`unlearn resume {folder}` continues it"
            raise UserError(f"the run '{folder}' is not complete: it has no results.json", hint)
        several = any(folder.glob("*/results.json"))
        hint = f"give the runs in it: {folder}/*" if several else FINISHED
        raise UserError(f"'{folder}' holds no results.json", hint)
    results = _json(path)
    if not isinstance(results, dict) or not isinstance(results.get("metrics"), dict):
        raise UserError(f"'{path}' holds no results: it has no metrics", "was it changed by hand?")
    results |= {"run": str(folder)}
    if "leakage" not in results and (found := _leakage(folder, results["metrics"])):
        results["leakage"] = found
    return Found(folder, results, _recipe(folder / "recipe.yaml"))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"'{path}' cannot be read: {error}", "restore it, or run again") from error


def _recipe(path: Path) -> dict[str, Any] | None:
    """Read a resolved recipe with every value as it is written: YAML 1.1 takes `on:` for a bool."""
    if not path.is_file():
        return None
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read: {error}", "restore it") from error
    return recipe if isinstance(recipe, dict) else None


def _leakage(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Count leaked rows in the stored records of a run or an evaluation."""
    counts = {who: leakage(_records(folder, who)) for who in metrics}
    return {who: found for who, found in counts.items() if found}


def _records(folder: Path, who: str) -> list[dict[str, Any]]:
    stored = folder / "evals" / f"{who}.json"
    lines = folder / ("records.jsonl" if who == "after" else f"records_{who}.jsonl")
    if stored.is_file():
        return list(_json(stored).get("records") or [])
    if not lines.is_file():
        return []
    try:
        text = lines.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise UserError(f"'{lines}' cannot be read: {error}", "restore it") from error
