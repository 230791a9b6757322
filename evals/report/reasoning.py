"""The page of an evaluation on problems: pass@k and how sure it is, lengths, examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.ticker import MaxNLocator

from unlearn.evals.report.page import render
from unlearn.evals.report.plots import LINES, Plot, drawing, tidy, to_plot
from unlearn.runs import write_atomic

SHOWN = 2
"""Examples of each kind."""
HEAD, TAIL = 700, 500
"""Characters of a long answer that are shown of its beginning and its end."""


def write_page(
    folder: Path, results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``report.html`` and ``pass_at_k.svg``; the page needs nothing but itself."""
    settings, details = results["settings"], results["details"]["after"]
    plot = draw_pass_at_k(settings["curve"])
    if plot:
        write_atomic(folder / f"{plot.name}.svg", plot.standalone())
    context = {
        "title": f"Problems: {results['model']}",
        "results": results,
        "settings": settings,
        "passes": _passes(details),
        "error": details.get("math_sampling_error"),
        "tokens": details.get("math_tokens"),
        "lengths": _lengths(records),
        "truncated": details["math_truncated"],
        "plot": plot,
        "examples": _examples(records),
        "shown": SHOWN,
        "facts": {**_facts(settings), **_origin(results["provenance"])},
    }
    write_atomic(folder / "report.html", render("reasoning.html.j2", context))


def draw_pass_at_k(curve: Sequence[Sequence[float]]) -> Plot | None:
    """Draw pass@k against the number of samples; None where there is one sample."""
    if len(curve) < 2:
        return None
    with drawing(2.6) as figure:
        axes = figure.subplots()
        ks, values = zip(*curve, strict=True)
        axes.plot(ks, values, color=LINES[0], linewidth=1.8, marker="o", markersize=4)
        axes.set_xlabel("k, samples of each problem")
        axes.set_ylabel("pass@k")
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        tidy(axes)
        for (k, value), bound in ((curve[0], 0.15), (curve[-1], 0.85)):
            below = value > bound  # the curve rises: under its start and over its end is room
            axes.annotate(
                f"{value:.3f}",
                xy=(k, value),
                xytext=(0, -9 if below else 7),
                textcoords="offset points",
                ha="left" if k == ks[0] else "right",
                va="top" if below else "bottom",
                color=LINES[0],
            )
        return to_plot(figure, "pass_at_k", "pass@k by number of samples")


def _passes(details: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    name = "math_pass_at_"
    return [
        (f"pass@{key.removeprefix(name)}", metric)
        for key, metric in details.items()
        if key.startswith(name)
    ]


def _lengths(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, Any, Any, float]]:
    """Give kind, number, median and largest length, and share truncated of right and wrong."""
    every = [one for record in records for one in record["samples"]]
    groups = {
        "All": every,
        "Right": [one for one in every if one["correct"]],
        "Wrong": [one for one in every if not one["correct"]],
    }
    found = []
    for name, group in groups.items():
        counts = [one["tokens"] for one in group if one["tokens"] is not None]
        cut = sum(one["truncated"] for one in group) / len(group) if group else 0.0
        middle = round(median(counts)) if counts else None
        found.append((name, len(group), middle, max(counts) if counts else None, cut))
    return found


def _examples(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Give the first right and the first wrong samples, each of another problem."""
    found = []
    for title, wanted in (("Right", True), ("Wrong", False)):
        chosen: list[dict[str, Any]] = []
        for record in records:
            one = next((s for s in record["samples"] if s["correct"] == wanted), None)
            if one and len(chosen) < SHOWN:
                chosen.append(_example(record, one))
        found.append((title, chosen))
    return [(title, chosen) for title, chosen in found if chosen]


def _example(record: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any]:
    text = one["text"]
    left_out = max(0, len(text) - HEAD - TAIL)
    right = sum(sample["correct"] for sample in record["samples"])
    return {
        "question": record["question"],
        "answer": record["answer"],
        "extracted": one["extracted"],
        "head": text[:HEAD] if left_out else text,
        "tail": text[-TAIL:] if left_out else "",
        "left_out": left_out,
        "tokens": one["tokens"],
        "truncated": one["truncated"],
        "right": f"{right} of {len(record['samples'])}",
    }


def _facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "problems": "Problems",
        "n": "Samples of each",
        "temperature": "Temperature",
        "top_p": "Top-p",
        "max_new_tokens": "Longest completion, tokens",
        "force_prefix": "Begun for the model",
        "instruction": "Instruction",
        "judge": "Judge",
        "seed": "Seed",
    }
    return {title: settings[name] for name, title in names.items() if settings[name] != ""}


def _origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "model": "Model",
        "endpoint": "Endpoint",
        "weights_sha256": "Weights (sha256)",
        "dtype": "Precision",
        "device": "Device",
        "data": "Data",
        "data_sha256": "Problems (sha256)",
        "command": "Command",
        "finished": "Finished",
    }
    return {t: provenance[n] for n, t in names.items() if provenance.get(n) is not None}
