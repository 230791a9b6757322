"""``unlearn recipes``: see, copy and check the recipes; the JSON Schema for editors."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import MISTAKE, Json, say

app = typer.Typer(
    help="List, show, copy and check recipes: the YAML files that describe a run.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="A method (npo), a preset (tofu-tiny/npo) or a file.")]


@app.command("list")
def list_recipes(json: Json = False) -> None:
    """List the methods and the presets that ship."""
    from unlearn.recipes.files import find, method_names, preset_names, read
    from unlearn.recipes.terms import rows_of

    rows = []
    for kind, names in (("method", method_names()), ("preset", preset_names())):
        for name in names:
            path = find(name)
            tree = read(path)
            terms = {
                stream: [term for term in tree.get("terms", ()) if rows_of(term["on"]) == stream]
                for stream in ("forget", "retain", "pairs", "text")
            }
            texts = {key: tree.get(key, "") for key in ("description", "source")}
            edit, first = tree.get("edit", {}).get("name"), tree.get("first", {}).get("terms", [])
            where = {"edit": edit, "first": first, **texts, "path": str(path)}
            rows.append({"name": name, "kind": kind, **terms, **where})
    say({"recipes": rows}, json=json, people=_print_list)


@app.command()
def show(
    name: Name,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="All keys, with the defaults filled in.")
    ] = False,
    json: Json = False,
) -> None:
    """Show a recipe as it is on disk, or with all its defaults."""
    from unlearn.recipes.files import dump, find, load, read, read_text

    _require_file(name)
    path = find(name)
    if resolved:
        recipe = load(name)
        text, tree = dump(recipe), recipe.model_dump(mode="json")
    else:
        text, tree = read_text(path), read(path)
    shown = {"name": name, "path": str(path), "yaml": text, "recipe": tree}
    say(shown, json=json, people=_print_yaml)


def _require_file(name: str) -> None:
    """Say where the settings are of the one method that has no recipe file.

    Raises:
        UserError: as said.
    """
    from unlearn.errors import UserError
    from unlearn.recipes.mtp import METHOD

    if name == METHOD:
        raise UserError(
            f"method {METHOD} has no recipe file to show: its settings are in docs/mtp.md",
            f"`unlearn run {METHOD} --help` has the options; each run leaves its own recipe.yaml",
        )


@app.command()
def copy(
    name: Name,
    file: Annotated[Path, typer.Argument(help="New file, or a folder to put it in.")],
    json: Json = False,
) -> None:
    """Copy a recipe into a file of your own, to be changed and run."""
    from unlearn.errors import UserError
    from unlearn.recipes.files import SUFFIXES, find, read_text

    path = find(name)
    target = file / path.name if file.is_dir() else file
    if target.suffix not in SUFFIXES:
        raise UserError(f"'{file}' is not a YAML file name", f"for instance {target}.yaml")
    text = read_text(path).replace(f"unlearn run {name} ", f"unlearn run {target} ", 1)
    if target.exists():
        raise UserError(f"'{target}' exists and is left as it is", "give another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"cannot write '{target}': {error.strerror}") from None
    say({"name": name, "path": str(target)}, json=json, people=_print_copied)


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(help="Recipe files, or names of recipes.")],
    json: Json = False,
) -> None:
    """Check recipes and name every mistake; exit code 2 when there is one."""
    from unlearn.errors import UserError

    checked = [_check(file) for file in files]
    valid = all(result["valid"] for result in checked)
    if json:
        say({"valid": valid, "files": checked}, json=True, people=_print_yaml)
        raise typer.Exit(0 if valid else MISTAKE)
    _print_checked(checked)
    if not valid:
        raise UserError("\n".join(r["error"] for r in checked if not r["valid"]))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
    json: Json = False,
) -> None:
    """Print the JSON Schema of recipes, from which editors complete and check while you type."""
    from unlearn.errors import UserError
    from unlearn.recipes.files import json_schema

    found = json_schema()
    if out is None:
        say(found, json=True, people=_print_yaml)
        return
    try:
        out.write_text(json_module.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror}") from None
    say({"path": str(out)}, json=json, people=_print_schema_use)


def _loss(terms: list[dict[str, Any]], edit: str | None = None) -> str:
    """Name the terms, or the edit that needs none; their weights are for ``recipes show``."""
    return " + ".join(term["objective"] for term in terms) or edit or "–"


def _check(file: str) -> dict[str, Any]:
    from unlearn.errors import UserError
    from unlearn.recipes.files import load
    from unlearn.recipes.mistakes import RecipeError

    try:
        recipe = load(file)
    except RecipeError as error:
        mistakes = [
            {"key": mistake.key, "line": mistake.line, "message": mistake.message}
            for mistake in error.mistakes
        ]
        return {"file": file, "valid": False, "error": str(error), "mistakes": mistakes}
    except UserError as error:
        mistakes = [{"key": "", "line": None, "message": error.message}]
        return {"file": file, "valid": False, "error": str(error), "mistakes": mistakes}
    return {"file": file, "valid": True, "method": recipe.method, "needs": recipe.missing()}


def _print_list(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = {
        "methods": [row for row in found["recipes"] if row["kind"] == "method"],
        "presets": [row for row in found["recipes"] if row["kind"] == "preset"],
    }
    for title, rows in shown.items():
        for name, part, columns in (
            (title, [row for row in rows if not _posttrains(row)], ("forget", "retain")),
            ("post-training", [r for r in rows if _posttrains(r)], ("first", "then")),
        ):
            if not part:
                continue
            table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
            table.add_column(Text(name, style="bold not dim"), no_wrap=True)
            table.add_column(columns[0], style="red")
            table.add_column(columns[1], style="cyan")
            table.add_column("source", style="dim", no_wrap=columns[1] == "then")
            for row in part:
                table.add_row(*map(Text, (row["name"], *_losses(row), row["source"])))
            console.print(table)
            console.print()
    hint = "`unlearn recipes show npo` prints one, `… copy npo FILE` makes it yours"
    console.print(hint, style="dim", highlight=False)


def _posttrains(row: dict[str, Any]) -> bool:
    return bool(row["pairs"] or row["text"])


def _losses(row: dict[str, Any]) -> tuple[str, str]:
    """Name the losses on both sets, or those of both stages."""
    if _posttrains(row):
        return _loss(row["first"]), _loss([*row["pairs"], *row["text"]])
    return _loss(row["forget"], row["edit"]), _loss(row["retain"])


def _print_yaml(shown: dict[str, Any]) -> None:
    import sys

    from rich.console import Console
    from rich.syntax import Syntax

    if not sys.stdout.isatty():
        print(shown["yaml"], end="")
        return
    console = Console()
    console.print(f"# {shown['path']}", style="dim", highlight=False, soft_wrap=True)
    console.print(
        Syntax(shown["yaml"], "yaml", theme="ansi_dark", background_color="default", word_wrap=True)
    )


def _print_copied(copied: dict[str, Any]) -> None:
    path = copied["path"]
    print(f"{path} is a copy of {copied['name']}. Change it, then:")
    print(f"  unlearn recipes validate {path}")
    print(f"  unlearn run {path} --out …")


def _print_checked(checked: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    for result in checked:
        file = escape(result["file"])
        if not result["valid"]:
            console.print(f"[red]✗[/red] {file}", highlight=False, soft_wrap=True)
            continue
        needs = ", ".join(need.split(" ")[0] for need in result["needs"])
        note = f"[dim]  a run still needs {needs}[/dim]" if needs else ""
        console.print(f"[green]✓[/green] {file}{note}", highlight=False, soft_wrap=True)


def _print_schema_use(written: dict[str, Any]) -> None:
    print(f"{written['path']} written. Name it in the first line of a recipe:")
    print(f"  # yaml-language-server: $schema={written['path']}")
