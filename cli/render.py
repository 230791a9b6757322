"""Results for people, on stdout."""

from typing import Any

from rich.markup import escape

from unlearn.cli.progress import COLOURS, in_words, number

PLAIN: dict[str, Any] = {
    "box": None,
    "title_justify": "left",
    "title_style": "bold",
    "pad_edge": False,
}
"""How tables look: no frame, so that they can be copied and fit narrow terminals."""
MOST_ROWS = 8
"""A table with more metrics is set out in blocks."""


def print_results(results: dict[str, Any]) -> None:
    """Print before, after and retain model side by side, a few answers, and where things are."""
    from rich.console import Console

    console = Console()
    console.print()
    console.print(_metrics(results))
    if results["training"].get("trials"):
        from unlearn.cli.reapply import show_trials

        console.print()
        show_trials(console, results["training"])
    _say_what_matters(console, results)
    if results["examples"]:
        console.print()
        for row in _chosen(results["examples"]):
            console.print(_answers(row, _columns(results)))
    for name in ("model", "report"):
        console.print(f"[bold]{name:<7}[/]{escape(results[name])}", highlight=False, soft_wrap=True)


def _say_what_matters(console: Any, results: dict[str, Any]) -> None:
    """Print which step was kept and what a reader must know."""
    if chosen := results.get("selected"):
        metric, value = chosen["metric"], number(chosen["value"])
        console.print(f"step {chosen['step']} was kept: {metric} {value}", highlight=False)
    if clamp := results["training"].get("clamp"):
        console.print(_clamped(clamp), highlight=False)
    for text in results.get("warnings", ()):
        console.print(f"[yellow]note:[/] {escape(text)}", highlight=False)


def _clamped(clamp: dict[str, Any]) -> str:
    """Say what was clamped, what it came to, and that nothing is erased."""
    layers = ", ".join(str(one["layer"]) for one in clamp["dictionaries"])
    number_of = sum(len(one["features"]) for one in clamp["dictionaries"])
    return (
        f"{number_of} features of layer {layers} clamped (c {clamp['c']}, tau {clamp['tau']:g}): "
        f"forget loss {number(clamp['start']['forget/nll'])} → {number(clamp['forget/nll'])}, "
        f"retain KL {number(clamp['retain/kl'])}; suppressed, not erased"
    )


def _columns(results: dict[str, Any]) -> list[str]:
    return [name for name in ("before", "after", "retain_model") if name in results["metrics"]]


def _metrics(results: dict[str, Any]) -> Any:
    if len(results["details"]["before"]) > MOST_ROWS:
        return _blocks(results)
    return _by_split(results)


def _by_split(results: dict[str, Any]) -> Any:
    from rich.table import Table

    columns = _columns(results)
    table = Table(title=f"{results['method']}: before and after", **PLAIN)
    table.add_column("")
    table.add_column("")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    table.add_column("wanted", style="dim")
    previous = None
    for key, metric in results["details"]["before"].items():
        split = key.partition("_")[0]
        if previous not in (None, split):
            table.add_section()
        cells = [_cell(results["details"][name].get(key)) for name in columns]
        label = f"[{COLOURS.get(split, 'default')}]{split}[/]" if split != previous else ""
        table.add_row(label, in_words(key), *cells, metric["direction"].replace("none", ""))
        previous = split
    return table


def _blocks(results: dict[str, Any]) -> Any:
    """Set many metrics out in blocks, as the report does."""
    from rich.table import Table

    from unlearn.evals.report.table import blocks, columns, table

    rows = table(results)
    models = columns(rows)
    drawn = Table(title=f"{results['method']}: before and after", **PLAIN)
    drawn.add_column("")
    for title in models.values():
        drawn.add_column(title.lower(), justify="right", no_wrap=True)
    drawn.add_column("wanted", style="dim")
    for title, chosen in blocks(rows).items():
        drawn.add_row(f"[bold]{title}[/]")
        for row in chosen:
            cells = (row.cell(who) for who in models)
            values = (number(cell.value) if cell else "–" for cell in cells)
            drawn.add_row(f"  {row.title}", *values, row.direction.replace("none", ""))
        drawn.add_section()
    return drawn


def _cell(metric: dict[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    error = metric.get("standard_error")
    return f"{metric['value']:.3f}" + (f" [dim]± {error:.3f}[/]" if error is not None else "")


def _chosen(examples: list[dict[str, Any]], per_split: int = 2) -> list[dict[str, Any]]:
    """Choose the first answers to the forget and retain sets; the report has more."""
    splits = [name for name in COLOURS if any(row["split"] == name for row in examples)]
    return [
        row
        for split in splits
        for row in [row for row in examples if row["split"] == split][:per_split]
    ]


def _answers(row: dict[str, Any], columns: list[str]) -> Any:
    """Show one question with the true answer and what each model wrote, one below the other."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=12, no_wrap=True)
    table.add_column(ratio=1)
    colour = COLOURS.get(row["split"], "default")
    table.add_row(f"[{colour}]{row['split']}[/]", Text(shortened(row["question"]), style="bold"))
    table.add_row("[dim]true answer[/]", Text(shortened(row["answer"]), style="dim"))
    for name in columns:
        table.add_row(name.replace("_", " "), Text(shortened(row.get(name) or "(nothing)")))
    table.add_row()
    return table


def shortened(text: str, longest: int = 240) -> str:
    """Give a text on one line, cut where it becomes too long to compare.

    Characters that would steer the terminal are shown as dots: an unlearned model writes anything.
    """
    printable = "".join(c if c.isprintable() or c.isspace() else "\N{MIDDLE DOT}" for c in text)
    line = " ".join(printable.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
