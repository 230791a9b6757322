"""``unlearn report`` and ``unlearn compare``: pages and tables from finished runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn.cli.entry import Json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

REPORT = "Example: [bold]unlearn report runs/a runs/b --out report[/bold]"
COMPARE = "Example: [bold]unlearn compare runs/* --x forget_Q_A_Prob --y retain_Q_A_Prob[/bold]"
PAGES = (".html", ".htm")

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN", help="Folders of finished runs or evaluations."),
]


def report(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PLACE",
            help="Folder, or an .html file. One run: its own folder; several: 'report'.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write the report of a run, or of several: HTML, Markdown and JSON.

    Several runs become one page: the leaderboard first, then each run.
    """
    from unlearn.evals.report.folders import open_folders

    found = open_folders(runs)
    default = found[0].folder if len(found) == 1 else Path("report")
    folder, stem = _place(out, default, "report", own=runs if len(found) == 1 else ())
    with _written_to(folder):
        if len(found) == 1:
            from unlearn.evals.report.write import write_report

            content = write_report(folder, found[0].results, stem=stem)
            said = [content["headline"]]
        else:
            from unlearn.evals.report.leaderboard import write_reports

            content = write_reports(folder, found, stem=stem)
            ranked = content["leaderboard"]
            said = [ranked["headline"] if ranked else content["not_ranked"]]
    say(_files(folder, stem) | {"headline": said[0]}, json=json, people=_report_written)


def compare(
    runs: Runs,
    x: Annotated[
        str | None,
        typer.Option("--x", metavar="METRIC", help="Metric of forgetting."),
    ] = None,
    y: Annotated[
        str | None,
        typer.Option("--y", metavar="METRIC", help="Metric of utility."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PLACE", help="Write HTML, Markdown, JSON and the plot here: folder or .html."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Rank runs by forgetting and utility; seeds of one recipe are one row."""
    from unlearn.evals.report.compare import compare as compare_runs
    from unlearn.evals.report.folders import open_folders

    comparison = compare_runs(open_folders(runs), x=x, y=y)
    if out:
        from unlearn.evals.report.leaderboard import write_comparison

        folder, stem = _place(out, out, "compare", own=())
        with _written_to(folder):
            write_comparison(folder, comparison, stem=stem)
        comparison = comparison | {"files": _files(folder, stem)}
    say(comparison, json=json, people=_leaderboard)


def _place(
    out: Path | None, default: Path, stem: str, *, own: "Sequence[Path]"
) -> tuple[Path, str]:
    """Give the folder and the name, without ending, of the files to write.

    Raises:
        UserError: the place is an existing file of another kind, or the folder of a run or an
            evaluation that is not one of ``own``, whose report would be lost.
    """
    from unlearn.errors import UserError

    if out is None:
        return default, stem
    if out.suffix.lower() in PAGES and not out.is_dir():
        return out.parent, out.stem
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file", "give a folder or a file that ends in .html")
    mine = {run.resolve() for run in own}
    if (out / "results.json").is_file() and out.resolve() not in mine:
        raise UserError(
            f"'{out}' is the folder of a run or an evaluation, whose report would be lost",
            "choose another --out",
        )
    return out, stem


def _written_to(folder: Path) -> Any:
    """Turn a folder that cannot be written into a user's mistake."""
    from contextlib import contextmanager

    from unlearn.errors import UserError

    @contextmanager
    def checked() -> Any:
        try:
            yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            message = f"cannot write into '{folder}': {error.strerror}"
            raise UserError(message, "choose another place with --out") from error

    return checked()


def _files(folder: Path, stem: str) -> dict[str, str]:
    return {
        kind: str(folder / f"{stem}.{ending}")
        for kind, ending in (("html", "html"), ("markdown", "md"), ("json", "json"))
    }


def _report_written(written: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(escape(written["headline"]), highlight=False)
    _print_files(console, written)


def _print_files(console: Any, files: dict[str, str]) -> None:
    from rich.markup import escape

    for kind in ("html", "markdown", "json"):
        console.print(f"[bold]{kind:<9}[/]{escape(files[kind])}", highlight=False, soft_wrap=True)


def _leaderboard(comparison: dict[str, Any]) -> None:
    """Print the leaderboard: the two axes, and other columns as far as the terminal is wide."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from unlearn.cli.render import PLAIN

    console = Console()
    shown = comparison["metrics"][: max(2, (console.width - 44) // 22)]
    table = Table(title="● on the Pareto front", **PLAIN)
    table.add_column("")
    table.add_column("run", overflow="fold")
    table.add_column("seeds", justify="right")
    for metric in shown:
        arrow = {"lower": " ↓", "higher": " ↑"}.get(metric["direction"], "")
        table.add_column(f"{escape(metric['name'])}{arrow}", justify="right")
    for row in comparison["rows"]:
        cells = [_cell(row["values"][metric["name"]]) for metric in shown]
        sign = "●" if row["front"] else " "
        table.add_row(sign, f"{row['place']}. {escape(row['name'])}", str(row["n"]), *cells)
    table.add_section()
    for row in comparison["references"]:
        cells = [_cell(row["values"][metric["name"]]) for metric in shown]
        table.add_row("", escape(row["name"]), "", *cells, style="dim")
    for warning in comparison["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    console.print(table)
    if any(row["n"] > 1 for row in comparison["rows"]):
        console.print("± is half of the 95 % t interval over seeds", style="dim", highlight=False)
    if files := comparison.get("files"):
        _print_files(console, files)


def _cell(estimate: dict[str, Any] | None) -> str:
    from unlearn.evals.report.table import number

    if estimate is None:
        return "–"
    if estimate["high"] is None:
        return number(estimate["mean"])
    return f"{number(estimate['mean'])} [dim]± {number(estimate['high'] - estimate['mean'])}[/]"
