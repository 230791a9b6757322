"""Benchmarks and audits as files: figures (JSON), a page for people (Markdown), the ROC plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.evals.detection.bench import Scored, curves
from unlearn.evals.detection.plots import draw_roc
from unlearn.evals.report.page import markdown
from unlearn.runs import staged, write_atomic, write_json

CAUTION = (
    "A figure near 1 says that these two sets differ for the model. That they differ in membership "
    "follows only if they differ in nothing else. On texts from one distribution loss and Min-K% "
    "are close to guessing: on the Pile, AUC 0.51 to 0.52 for Pythia 6.9B and 12B (mimir)."
)


def write_bench(folder: Path, found: Mapping[str, Any], scored: Sequence[Scored]) -> None:
    """Write a benchmark into a new folder, complete or not at all."""
    areas = {name: one["auc"]["value"] for name, one in found["metrics"].items() if one}
    plot = draw_roc({name: c for name, c in curves(scored).items() if name in areas}, areas)
    with staged(folder) as staging:
        write_json(staging / "bench.json", found)
        rows = (json.dumps({"id": place, **one.as_json()}) for place, one in enumerate(scored))
        write_atomic(staging / "scores.jsonl", "".join(f"{row}\n" for row in rows))
        write_atomic(staging / "roc.svg", plot.standalone())
        write_atomic(staging / "bench.md", "\n".join(bench_page(found)) + "\n")


def write_audit(folder: Path, found: Mapping[str, Any]) -> None:
    """Write an audit into a new folder, complete or not at all."""
    with staged(folder) as staging:
        write_json(staging / "audit.json", found)
        write_atomic(staging / "audit.md", "\n".join(audit_page(found)) + "\n")


def bench_page(found: Mapping[str, Any]) -> Iterator[str]:
    """Say everything a benchmark found, line by line, in Markdown."""
    yield f"# Membership scores on {markdown(found['data'])}"
    yield ""
    yield (
        f"Model {markdown(found['model'])}; {found['members']} members, "
        f"{found['nonmembers']} non-members. Below, 95 % bootstrap intervals over the texts."
    )
    yield ""
    for warning in found["checks"]["warnings"]:
        yield f"> **Warning:** {markdown(warning)}"
        yield ""
    yield from _metrics(found["metrics"])
    yield ""
    yield "![ROC curves](roc.svg)"
    yield ""
    if blind := found["checks"].get("blind_auc"):
        yield f"Without the model, from words alone: AUC {blind:.3f}."
        yield ""
    yield from _differences(found)
    yield from _groups(found)
    yield f"_{CAUTION}_"


def _differences(found: Mapping[str, Any]) -> Iterator[str]:
    if not found["differences"]:
        return
    yield "## Against the plain loss"
    yield ""
    yield "| score | AUC minus that of the loss | 95 % interval |"
    yield "|:--|--:|:--|"
    for name, one in found["differences"].items():
        yield f"| {name} | {one['value']:+.3f} | {one['low']:+.3f} to {one['high']:+.3f} |"
    yield ""


def _groups(found: Mapping[str, Any]) -> Iterator[str]:
    if len(found["groups"]) < 2:
        return
    yield "## By length or part"
    yield ""
    names = list(found["metrics"])
    yield f"| texts | members | non-members | {' | '.join(f'AUC {name}' for name in names)} |"
    yield "|:--" + "|--:" * (len(names) + 2) + "|"
    for group in found["groups"]:
        cells = [_figure((group["metrics"] or {}).get(name)) for name in names]
        sizes = f"{group['members']} | {group['nonmembers']}"
        yield f"| {markdown(group['group'])} | {sizes} | {' | '.join(cells)} |"
    yield ""


def _metrics(metrics: Mapping[str, Any]) -> Iterator[str]:
    titles = ("AUC", "TPR at 5 % FPR", "TPR at 1 % FPR", "FPR at 95 % TPR")
    keys = ("auc", "tpr@5%fpr", "tpr@1%fpr", "fpr@95%tpr")
    yield f"| score | {' | '.join(titles)} |"
    yield "|:--" + "|:--" * len(titles) + "|"
    for name, one in metrics.items():
        cells = [with_interval(one[key]) if one else "–" for key in keys]
        yield f"| {name} | {' | '.join(cells)} |"


def _figure(one: Mapping[str, Any] | None) -> str:
    return "–" if one is None else with_interval(one["auc"])


def with_interval(one: Mapping[str, Any]) -> str:
    """Write a figure with its interval; a dash where there is none."""
    if one.get("value") is None:
        return "–"
    return f"{one['value']:.3f} ({one['low']:.3f} – {one['high']:.3f})"


def audit_page(found: Mapping[str, Any]) -> Iterator[str]:
    """Say everything an audit found, line by line, in Markdown."""
    yield "# Is the forget set still familiar?"
    yield ""
    before, after = (markdown(found["models"][who]) for who in ("before", "after"))
    yield f"Before {before}, after {after}."
    yield ""
    for warning in found["checks"]["warnings"]:
        yield f"> **Warning:** {markdown(warning)}"
        yield ""
    models = [who for who in ("before", "after", "retain_model") if who in found["models"]]
    titles = {"before": "AUC before", "after": "AUC after", "retain_model": "AUC retain model"}
    yield f"| score | {' | '.join(titles[who] for who in models)} | change | PrivLeak after |"
    yield "|:--" + "|:--" * (len(models) + 1) + "|--:|"
    for name, one in found["scores"].items():
        cells = [with_interval(one["auc"][who]) for who in models]
        leak = f"{one['privleak']['after']:+.1f} %"
        yield f"| {name} | {' | '.join(cells)} | {with_interval(one['change'])} | {leak} |"
    yield ""
    for line in found["verdict"]:
        yield f"- {markdown(line)}"
