"""``unlearn sweep``: recipes, settings and seeds as one set of runs, and the table of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import FAILED, WORDS, Halt, Json, Offline, go_offline, say
from unlearn.cli.options import GIVEN, HOW, Forget, Lora, Map, Model, Pairs, Retain, Set, Text
from unlearn.cli.resolve import changes_of

EPILOG = (
    "Example: [bold]unlearn sweep tofu-tiny/npo tofu-tiny/grad_diff --seeds 0,1,2 "
    "--grid training.learning_rate=5e-4,1e-3 --model models/target --forget people#forget "
    "--retain people#retain --out runs/sweep[/bold]"
)
NAME, NAMES, GAP = 14, 40, 2
"""Least and largest width of a name, and the space between columns, in characters."""
NO_BREAK = "\N{NO-BREAK SPACE}"

Recipes = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE…",
        help="Methods, presets or recipe files; or one file that describes a sweep.",
    ),
]
Grid = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="KEY=A,B,…",
        help="Values of a recipe key; may be given again: all combinations are run.",
        rich_help_panel=GIVEN,
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="0,1,2",
        help="Seeds of every combination; default: the recipe's own.",
        rich_help_panel=GIVEN,
    ),
]
Random = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Run N combinations of the grid only, always the same ones.",
        rich_help_panel=GIVEN,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder of the sweep. The same command again goes on in it.",
        rich_help_panel=GIVEN,
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Runs at a time, each a process of its own; they share the CPU's threads.",
        rich_help_panel=HOW,
    ),
]
Print = Annotated[
    bool,
    typer.Option("--print", metavar="", help="List the runs and stop.", rich_help_panel=HOW),
]
Curve = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Draw metrics against this key of the grid; default: data.select.fraction.",
        rich_help_panel=HOW,
    ),
]
Markdown = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write the table, with the command that makes it.",
        rich_help_panel=HOW,
    ),
]


def sweep(
    recipes: Recipes,
    grid: Grid = None,
    seeds: Seeds = None,
    random: Random = None,
    model: Model = None,
    forget: Forget = None,
    retain: Retain = None,
    pairs: Pairs = None,
    text: Text = None,
    out: Out = None,
    map_: Map = None,
    set_: Set = None,
    lora: Lora = False,
    jobs: Jobs = 1,
    print_: Print = False,
    curve: Curve = None,
    markdown: Markdown = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Run recipes × settings × seeds; complete runs are skipped, stopped ones go on.

    Ends with a table over seeds and a leaderboard. A run that fails does not stop the others.
    """
    from unlearn.cli.ranks import require_one_process
    from unlearn.recipes.sweep import cells_of, check_cells, is_sweep_file

    require_one_process("unlearn sweep")
    given = {"grid": _grid(grid), "seeds": _seeds(seeds), "random": random, "set": set_ or []}
    base = changes_of(map_, model=model, forget=forget, retain=retain, pairs=pairs, text=text)
    file = recipes[0] if len(recipes) == 1 and is_sweep_file(recipes[0]) else None
    described = _sweep(file, recipes, given, base, out=out, lora=lora)
    go_offline(offline)
    cells = cells_of(described)
    setting = _setting(described, curve)
    if print_:
        from unlearn.recipes.sweep_results import described as listed

        say({"cells": listed(cells)}, json=json, people=_print_cells)
        return
    check_cells(cells, Path(described.out), offline=offline)
    content = _run(described, cells, setting, jobs=jobs, offline=offline)
    if markdown:
        _write_markdown(markdown, content)
    _end(content, json=json)


def _sweep(
    file: str | None,
    recipes: list[str],
    given: dict[str, Any],
    base: dict[str, Any],
    *,
    out: Path | None,
    lora: bool,
) -> Any:
    """Put the options on top of the sweep file, or make a sweep of them alone."""
    from unlearn.errors import UserError
    from unlearn.recipes.overrides import overlay
    from unlearn.recipes.sweep import find_sweep, sweep_of

    tree = find_sweep(file) if file else {"recipes": recipes}
    options = {key: value for key, value in given.items() if value}
    options |= {"out": str(out)} if out else {}
    options |= {"lora": True} if lora else {}
    options |= {"base": base} if base else {}
    tree = overlay(tree, options)
    if "out" not in tree:
        raise UserError("--out is missing", "give the folder of the sweep")
    return sweep_of(tree)


def _grid(texts: list[str] | None) -> dict[str, list[str]]:
    from unlearn.errors import UserError
    from unlearn.recipes.sweep import split_values

    found: dict[str, list[str]] = {}
    for text in texts or []:
        key, equals, values = text.partition("=")
        several = split_values(values)
        if not equals or not key.strip() or not all(several):
            raise UserError(f"cannot read --grid {text}", "write KEY=A,B: beta=0.05,0.1")
        if key.strip() in found:
            raise UserError(f"--grid {key.strip()} is given twice", "put all values into one")
        found[key.strip()] = several
    return found


def _seeds(text: str | None) -> list[int]:
    from unlearn.errors import UserError

    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"cannot read --seeds {text}", "write whole numbers: 0,1,2")
    return [int(part) for part in parts]


def _setting(described: Any, curve: str | None) -> str | None:
    from unlearn.recipes.sweep_results import curve_setting

    return curve_setting(described, curve)


def _run(
    described: Any, cells: list[Any], setting: str | None, *, jobs: int, offline: bool
) -> dict[str, Any]:
    from unlearn.cli.progress import listening
    from unlearn.errors import Interrupted
    from unlearn.recipes.sweep_results import begin, finish
    from unlearn.recipes.sweep_run import run_cells
    from unlearn.runs import RunFolder

    out = Path(described.out)
    out.mkdir(parents=True, exist_ok=True)
    with RunFolder(out).locked(), listening() as emit:
        begin(described, cells)
        try:
            outcomes = run_cells(cells, jobs=jobs, emit=emit, offline=offline)
        except (Interrupted, Halt, KeyboardInterrupt):
            done = sum(cell.state == "complete" for cell in cells)
            text = f"{done} of {len(cells)} runs are complete"
            stopped = Interrupted(text)
            stopped.hint = "the same command goes on"
            raise stopped from None
        return finish(described, outcomes, curve=setting)


def _write_markdown(path: Path, content: dict[str, Any]) -> None:
    from unlearn.evals.report.seeds import to_markdown
    from unlearn.runs import write_atomic

    if content["table"]:
        write_atomic(path, to_markdown(content["table"], content["command"]))
        content["files"]["markdown"] = str(path)


def _end(content: dict[str, Any], *, json: bool) -> None:
    """Print the table; with failed runs the exit code is 1, and in JSON the error stands in it.

    Raises:
        RunFailed: names the runs that failed.
    """
    from unlearn.errors import RunFailed

    failed = [cell for cell in content["cells"] if cell["outcome"] == "failed"]
    if not failed:
        say(content, json=json, people=_print)
        return
    lines = [f"{cell['name']}: {cell['message']}" for cell in failed]
    message = f"{len(failed)} of {len(content['cells'])} runs failed: {'; '.join(lines)}"
    hint = "put right what they say, then the same command goes on"
    if not json:
        _print(content)
        raise RunFailed(message, hint)
    word = WORDS[FAILED]
    typer.echo(f"{word}: {message}\n  hint: {hint}", err=True)
    error = {"kind": word, "message": message, "hint": hint, "exit_code": FAILED}
    say(content | {"error": error}, json=True, people=_print)
    raise typer.Exit(FAILED)


def _print_cells(listed: dict[str, Any]) -> None:
    cells = listed["cells"]
    for cell in cells:
        print(f"{cell['state']:<9} {cell['name']}")
    waiting = sum(cell["state"] != "complete" for cell in cells)
    print(f"{len(cells)} runs, {waiting} to do")


def _print(content: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    if content["table"]:
        console.print(_table(content["table"], console.width))
        console.print(content["table"]["note"], style="dim", highlight=False)
    if content["not_ranked"]:
        console.print(f"no leaderboard: {content['not_ranked']}", highlight=False, markup=False)
    for kind, path in content["files"].items():
        console.print(f"[bold]{kind:<12}[/]", end="", highlight=False)
        console.print(path, highlight=False, markup=False, soft_wrap=True)


def _table(found: dict[str, Any], width: int) -> Any:
    """Draw the table; an interval stands under its mean, and as many columns are shown as fit."""
    from rich.markup import escape
    from rich.table import Table

    from unlearn.cli.render import PLAIN
    from unlearn.evals.report.seeds import ARROWS, cell_text

    rows = [*found["rows"], *found["references"]]
    names = max(NAME, min(NAMES, *(len(row["name"]) for row in rows)))
    table = Table(**PLAIN)
    table.add_column("", overflow="fold", width=names)
    table.add_column("seeds", justify="right", no_wrap=True)
    drawn, left = [], width - names - len("seeds") - GAP
    for column in found["columns"]:
        arrow = ARROWS.get(column["direction"], "").replace(" ", NO_BREAK)
        title = f"{column['title'][0].lower()}{column['title'][1:]}{arrow}"
        cells = [cell_text(row, column["metric"], "\n± ") for row in rows]
        words = [*title.replace(NO_BREAK, "_").split(), *"\n".join(cells).split("\n")]
        needed = max(map(len, words))
        left -= needed + GAP
        if left >= 0:
            table.add_column(title, justify="right", width=needed)
            drawn.append(cells)
    if len(drawn) < len(found["columns"]):
        table.caption = "more columns on a wider terminal, in sweep.json and with --markdown"
        table.caption_justify = "left"
    for place, row in enumerate(rows):
        style = "" if place < len(found["rows"]) else "dim"
        told = [cells[place] for cells in drawn]
        table.add_row(escape(row["name"]), str(row.get("n", "")), *told, style=style)
    return table
