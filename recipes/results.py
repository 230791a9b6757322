"""What a run found, as one JSON object: the content of ``results.json``. Imports no torch."""

import json
from collections.abc import Mapping
from typing import Any

from unlearn.evals.leakage import leakage
from unlearn.evals.side_by_side import side_by_side
from unlearn.evals.statistics import forget_ratios
from unlearn.runs import RunFolder

UNPLOTTED = ("event", "time", "of", "seconds", "tokens", "memory_bytes", "grad_norm")
"""What a step event holds beyond the numbers of the curve."""


def put_together(
    folder: RunFolder, method: str, manifest: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Join the stored results of each model, the course of training and the provenance."""
    provenance = dict(manifest)
    training = provenance.pop("training")
    selected = provenance.pop("selected", None)
    selection = provenance.get("selection")
    if selection:  # the row numbers are in manifest.json and below
        listed = {key: value for key, value in selection.items() if key != "indices"}
        provenance["selection"] = listed
    return {
        **_places(folder),
        "status": "complete",
        "method": method,
        "metrics": {
            name: {key: metric["value"] for key, metric in result["metrics"].items()}
            for name, result in found.items()
        },
        "details": {name: result["metrics"] for name, result in found.items()},
        "examples": side_by_side(found),
        "training": training | totals(folder) | course(folder, edit="edit" in training),
        "steps": steps(folder),
        "truth_ratios": {name: forget_ratios(result["records"]) for name, result in found.items()},
        "leakage": {name: leakage(result["records"]) for name, result in found.items()},
        "selected": selected,
        "selection": selection,
        "settings": found["after"]["settings"],
        "warnings": warnings(folder, found, selected),
        "provenance": provenance,
    }


def stored_results(folder: RunFolder) -> dict[str, Any]:
    """Read the results of a complete run; its paths lead there from where we are now."""
    return dict(json.loads(folder.results.read_text(encoding="utf-8"))) | _places(folder)


def course(folder: RunFolder, *, edit: bool) -> dict[str, Any]:
    """Give the curve; for an edit, whose steps are few and long, also how many and how long."""
    found = curve(folder)
    if not edit:
        return {"curve": found}
    return {"curve": found, "steps": len(found), "step_seconds": step_seconds(folder)}


def step_seconds(folder: RunFolder) -> list[float]:
    """Give how long each step of an edit took, the first of a session with what came before it.

    A step that was done again counts as the last time.
    """
    starts = [event["time"] for event in folder.events("stage") if event["stage"] == "edit"]
    took, session, before = {}, 0, 0.0
    for event in folder.events("step"):
        now = sum(start <= event["time"] for start in starts)
        since = before if now == session else 0.0
        took[event["step"]] = round(event["seconds"] - since, 3)
        session, before = now, event["seconds"]
    return [took[step] for step in sorted(took)]


def curve(folder: RunFolder) -> list[dict[str, Any]]:
    """Give one entry per step; after a kill, steps that were done again count once."""
    steps = {event["step"]: event for event in folder.events("step")}
    return [
        {key: value for key, value in steps[step].items() if key not in UNPLOTTED}
        for step in sorted(steps)
    ]


def steps(folder: RunFolder) -> list[dict[str, Any]]:
    """Give what was measured on the way, in order: step and metrics."""
    files = {int(path.stem.removeprefix("step-")): path for path in folder.steps()}
    return [
        {
            "step": step,
            "metrics": {
                name: metric["value"]
                for name, metric in json.loads(files[step].read_text())["metrics"].items()
            },
        }
        for step in sorted(files)
    ]


def warnings(
    folder: RunFolder, found: Mapping[str, Any], selected: Mapping[str, Any] | None
) -> list[str]:
    """Say what a reader must know: notes of the benchmarks, warnings of the run."""
    settings = found["after"]["settings"]
    parts = settings.values() if "+" in found["after"]["benchmark"] else [settings]
    lines = [note for part in parts for note in part.get("notes", ())]
    lines += [event["message"] for event in folder.events("warning")]
    if selected and not selected["satisfied"]:
        bounds = ", ".join(f"{name} {bound:g}" for name, bound in selected["constraints"].items())
        lines.append(f"no measured step met the constraints ({bounds}): the nearest was kept")
    return list(dict.fromkeys(lines))


def totals(folder: RunFolder) -> dict[str, float]:
    """Give the seconds and tokens of training, over all sessions of a run that was resumed.

    Step events count from the start of their session; work that was done again counts again.
    """
    ends: list[dict[str, Any]] = []
    for event in folder.events("step"):
        if ends and event["seconds"] >= ends[-1]["seconds"]:
            ends.pop()
        ends.append(event)
    seconds = sum(event["seconds"] for event in ends)
    return {"seconds": round(seconds, 2), "tokens": sum(event["tokens"] for event in ends)}


def _places(folder: RunFolder) -> dict[str, str]:
    return {
        "run": str(folder.path),
        "model": str(folder.model),
        "recipe": str(folder.recipe),
        "report": str(folder.path / "report.html"),
    }
