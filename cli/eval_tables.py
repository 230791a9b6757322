"""What ``unlearn eval`` found, for people, on stdout."""

from typing import TYPE_CHECKING, Any

from unlearn.cli.render import PLAIN, shortened

if TYPE_CHECKING:
    from rich.text import Text

SHARED = "bold green"
"""Words that an answer shares with the true one."""


def print_measured(found: dict[str, Any]) -> None:
    """Print metrics with their intervals."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"{found['benchmark']}: {escape(shortened(found['model']))}", **PLAIN)
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("wanted", style="dim")
    for name, metric in found["details"].items():
        wanted = metric["direction"].replace("none", "")
        table.add_row(name, _number(metric["value"]), _interval(metric), f"{metric['n']:,}", wanted)
    console.print(table)
    if found["settings"].get("chance") is not None:
        console.print(f"guessing gives {found['settings']['chance']}", style="dim")
    for note in found["settings"]["notes"]:
        console.print(f"note: {escape(shortened(note))}", style="yellow", highlight=False)
    if found.get("out"):
        console.print(f"[bold]results[/] {escape(found['out'])}", highlight=False, soft_wrap=True)


def print_answers(found: dict[str, Any]) -> None:
    """Print each prompt with the true answer and what each model wrote, one below the other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from unlearn.evals.questions import NAMES

    console = Console()
    for number, row in enumerate(found["rows"], start=1):
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        table.add_column(width=12, no_wrap=True)
        table.add_column(ratio=1)
        table.add_row(f"[dim]{number}[/]", Text(shortened(row["question"], 600), style="bold"))
        if row["answer"] is not None:
            table.add_row("[dim]true answer[/]", Text(shortened(row["answer"], 600), style="dim"))
        for who, text in row["answers"].items():
            table.add_row(NAMES[who], _answer(text, row["answer"]))
        table.add_row()
        console.print(table)


def _answer(text: str, truth: str | None) -> "Text":
    """Write an answer; the words it shares with the true one stand out."""
    from rich.text import Text

    shown = shortened(text, 600) or "(nothing)"
    if truth is None:
        return Text(shown)
    from unlearn.evals.report.overlap import shared_pieces

    parts = [(piece.text, SHARED if piece.shared else "") for piece in shared_pieces(truth, shown)]
    return Text.assemble(*parts)


def print_import(found: dict[str, Any]) -> None:
    """Print forget quality, model utility with its nine parts, and the other metrics."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    title = f"{escape(shortened(found['source']))} ({found['kind']})"
    table = Table(title=title, **PLAIN)
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    quality = found["forget_quality"]
    if quality is None:
        table.add_row("forget quality", "–", "give --retain-logs to compare with a retain model")
    else:
        distance = f"log10 p {quality['log10_p']:.2f}, KS distance {quality['ks']:.3f}"
        table.add_row("forget quality", f"{quality['p']:.3g}", distance)
    ratio = f"truth ratio: {found['truth_ratio']}"
    table.add_row("model utility", _number(found["model_utility"]), ratio)
    table.add_section()
    for name, metric in found["details"].items():
        if name not in ("model_utility", "forget_quality"):
            rows = f"{metric['n']:,} rows" if metric["n"] else ""
            table.add_row(name, _number(metric["value"]), rows)
    console.print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _interval(metric: dict[str, Any]) -> str:
    if metric["low"] is None or metric["high"] is None:
        error = metric["standard_error"]
        return "" if error is None else f"± {1.96 * error:.4f}"
    return f"{metric['low']:.3f} – {metric['high']:.3f}"
