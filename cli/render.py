"""Results and plans for people, on stdout."""

from typing import Any

from unlearn.cli.progress import clock, size

NAMES = {
    "forget_Q_A_Prob": "forget probability",
    "forget_Q_A_ROUGE": "forget ROUGE-L recall",
    "forget_extraction_strength": "forget extraction strength",
    "retain_Q_A_Prob": "retain probability",
    "retain_Q_A_ROUGE": "retain ROUGE-L recall",
    "retain_extraction_strength": "retain extraction strength",
}


def print_results(results: dict[str, Any]) -> None:
    """Print before, after and retain model side by side, a few answers, and where things are."""
    from rich.console import Console

    console = Console()
    console.print(_metrics(results))
    if results["examples"]:
        console.print(_answers(results))
    console.print(f"model   {results['model']}", highlight=False, soft_wrap=True)
    console.print(f"report  {results['report']}", highlight=False, soft_wrap=True)


def _columns(results: dict[str, Any]) -> list[str]:
    return [name for name in ("before", "after", "retain_model") if name in results["metrics"]]


def _metrics(results: dict[str, Any]) -> Any:
    from rich.table import Table

    columns = _columns(results)
    table = Table(title=f"{results['method']}: before and after", title_justify="left")
    table.add_column("metric")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for key in results["metrics"]["before"]:
        cells = [_cell(results["details"][name].get(key)) for name in columns]
        table.add_row(NAMES.get(key, key), *cells, end_section=key == "forget_extraction_strength")
    return table


def _cell(metric: dict[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    error = metric.get("standard_error")
    return f"{metric['value']:.3f}" + (f" [dim]± {error:.3f}[/dim]" if error is not None else "")


def _answers(results: dict[str, Any], per_split: int = 2) -> Any:
    from rich.markup import escape
    from rich.table import Table

    columns = _columns(results)
    table = Table(title="the same questions, asked before and after", title_justify="left")
    table.add_column("question", ratio=3)
    for name in ("true answer", *(name.replace("_", " ") for name in columns)):
        table.add_column(name, ratio=3)
    for split in ("forget", "retain"):
        rows = [row for row in results["examples"] if row["split"] == split][:per_split]
        for place, row in enumerate(rows):
            cells = [row["question"], row["answer"], *(row.get(name) or "" for name in columns)]
            colour = "red" if split == "forget" else "cyan"
            label = f"[{colour}]{split}[/{colour}] {escape(cells[0])}"
            rest = [escape(cell[:200]) for cell in cells[1:]]
            table.add_row(label, *rest, end_section=place == len(rows) - 1)
    return table


def print_plan(plan: dict[str, Any]) -> None:
    """Print what a run would cost."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    steps, tokens = plan["steps"], plan["tokens"]
    console.print(
        f"[bold]{steps['total']}[/bold] optimiser steps ({steps['per_epoch']} per epoch, "
        f"effective batch {steps['effective_batch']}), "
        f"about [bold]{tokens['total']:,}[/bold] tokens ({tokens['per_step']:,} per step), "
        f"{plan['parameters']['trainable']:,} of {plan['parameters']['total']:,} weights trained",
        highlight=False,
    )
    table = Table(title=f"memory on {plan['device']} ({plan['dtype']})", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("why", style="dim")
    for part in plan["memory"]:
        table.add_row(part["part"], size(part["bytes"]), part["why"])
    table.add_section()
    table.add_row("total", size(plan["memory_bytes"]), "estimate; --measure runs a step")
    console.print(table)
    files = Table(title="files that would be written", title_justify="left")
    files.add_column("path")
    files.add_column("size", justify="right")
    for file in plan["files"]:
        files.add_row(file["path"], size(file["bytes"]))
    files.add_section()
    files.add_row(
        f"free on that disk: {size(plan['disk']['free_bytes'])}", size(plan["disk"]["needed_bytes"])
    )
    console.print(files)
    if measured := plan.get("measured"):
        console.print(
            f"measured: {measured['seconds_per_step']:.2f} s per step, about "
            f"[bold]{clock(measured['estimated_seconds'])}[/bold] of training, "
            f"peak memory {size(measured['peak_memory_bytes'])}",
            highlight=False,
        )
