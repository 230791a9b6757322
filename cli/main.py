"""The ``unlearn`` command. Heavy imports happen inside the commands: ``--help`` must stay quick."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli import data, recipes
from unlearn.cli.entry import Json, Offline, go_offline, guarded, say

app = typer.Typer(
    help="Remove data from language models and show evidence a reader can check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")

Method = Annotated[
    str, typer.Argument(help="A method (npo, …), a preset (tofu-tiny/npo) or a recipe file.")
]
Model = Annotated[str | None, typer.Option(help="Folder or hub name of the model to change.")]
Forget = Annotated[str | None, typer.Option(help="What to remove: FILE, FOLDER#CONFIG:SPLIT, …")]
Retain = Annotated[str | None, typer.Option(help="What to keep, in the same form.")]
Out = Annotated[Path | None, typer.Option(help="New folder for the run.")]
Preset = Annotated[
    str | None, typer.Option("--recipe", help="Preset or recipe file to start from.")
]
Lora = Annotated[bool, typer.Option("--lora", help="Train low-rank adapters only.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe key.")
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        os.environ["UNLEARN_DEBUG"] = "1"
    if version:
        from unlearn import __version__

        print(f"unlearn {__version__}")
        raise typer.Exit


@app.command()
def run(
    method: Method,
    model: Model = None,
    forget: Forget = None,
    retain: Retain = None,
    out: Out = None,
    recipe: Preset = None,
    lora: Lora = False,
    set_: Set = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Unlearn: train a model to lose the forget set and keep the retain set."""
    changes = _changes(model=model, forget=forget, retain=retain, out=out)
    _run(_resolve(method, recipe, changes, set_ or [], lora), offline=offline, json=json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The --out folder of a stopped run.")],
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Continue a stopped run from its newest complete checkpoint."""
    from unlearn.recipes.files import load
    from unlearn.runs import RunFolder

    opened = RunFolder.open(folder)
    recipe = load(str(opened.recipe), [], {"out": str(folder)})
    go_offline(offline)
    from unlearn.recipes.run import resume as resume_run

    with _listening() as emit:
        results = resume_run(recipe, opened, emit=emit, offline=offline)
    _show(results, json=json)


@app.command()
def quickstart(
    out: Out = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Try everything offline: a small model forgets a few made-up people (about a minute)."""
    go_offline(True)
    from unlearn.recipes.quickstart import quickstart_recipe

    _run(quickstart_recipe(out, set_ or []), offline=True, json=json)


@app.command()
def plan(
    method: Method,
    model: Model = None,
    forget: Forget = None,
    retain: Retain = None,
    out: Out = None,
    recipe: Preset = None,
    lora: Lora = False,
    set_: Set = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model, time a step.")
    ] = False,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Say what a run would cost: steps, tokens, memory by part, files. Loads no weights."""
    changes = _changes(model=model, forget=forget, retain=retain, out=out or Path("runs/plan"))
    resolved = _resolve(method, recipe, changes, set_ or [], lora)
    go_offline(offline)
    from unlearn.cli.render import print_plan
    from unlearn.recipes.plan import measure_step, plan_run
    from unlearn.recipes.prepare import prepare

    prepared = prepare(resolved, offline=offline)
    planned = plan_run(prepared)
    if measure:
        planned = planned | {"measured": measure_step(prepared)}
    say(planned, json=json, people=print_plan)


def _changes(**given: Any) -> dict[str, Any]:
    places = {
        "model": ("model", "path"),
        "forget": ("data", "forget"),
        "retain": ("data", "retain"),
    }
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in places:
            section, key = places[name]
            changes.setdefault(section, {})[key] = value
        else:
            changes[name] = str(value)
    return changes


def _resolve(
    method: str, preset: str | None, changes: dict[str, Any], overrides: list[str], lora: bool
) -> Any:
    from unlearn.errors import UserError, unknown
    from unlearn.recipes.files import load, recipe_names

    if preset and method not in recipe_names():
        raise unknown("method", method, (name for name in recipe_names() if "/" not in name))
    resolved = load(preset or method, overrides, changes, lora=lora)
    if preset and resolved.method != method:
        message = f"recipe '{preset}' is for method '{resolved.method}', not '{method}'"
        raise UserError(message, f"unlearn run {resolved.method} --recipe {preset} …")
    return resolved


def _listening() -> Any:
    from unlearn.cli.progress import listening

    return listening()


def _run(recipe: Any, *, offline: bool, json: bool) -> None:
    recipe.require_runnable()
    go_offline(offline)
    with _listening() as emit:
        emit({"event": "stage", "stage": "start"})
        from unlearn.recipes.run import run as run_recipe

        results = run_recipe(recipe, emit=emit, offline=offline)
    _show(results, json=json)


def _show(results: dict[str, Any], *, json: bool) -> None:
    from unlearn.cli.render import print_results

    say(results, json=json, people=print_results)


def main() -> None:
    """Run the command line; turn errors into one line and a documented exit code."""
    guarded(app)


if __name__ == "__main__":
    main()
