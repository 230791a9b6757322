"""``unlearn curvature``: fit the curvature that K-FADE steps in, and look at what was fitted."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.options import Lora, Map, Method, Model, Preset, Retain, Set
from unlearn.cli.progress import Emit, listening
from unlearn.cli.ranks import require_one_process

app = typer.Typer(
    help="The curvature of the retain set, which the method kfade steps in: fit it, look at it.",
    no_args_is_help=True,
)


@app.command(
    epilog="Example: [bold]unlearn curvature fit kfade --model models/target "
    "--retain people#retain --out factors.safetensors[/bold]"
)
def fit(
    method: Method,
    model: Model = None,
    retain: Retain = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="New file, which edit.factors reads.")
    ] = ...,  # type: ignore[assignment]
    map_: Map = None,
    recipe: Preset = None,
    lora: Lora = False,
    set_: Set = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Fit once what runs of METHOD would each fit; no forget set is needed.

    Runs with the same model, retain set and settings read it: --set edit.factors=FILE.
    """
    from unlearn.cli.resolve import changes_of, resolve
    from unlearn.errors import UserError

    require_one_process("unlearn curvature fit")
    if out.exists():
        raise UserError(f"output file '{out}' already exists", "choose another --out")
    changes = changes_of(map_, model=model, retain=retain)
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        resolved = resolve(method, recipe, changes, set_ or [], lora=lora, here=False)
        found = _fitted(resolved, out, emit, offline=offline)
    say(found, json=json, people=_show_fitted)


def _fitted(recipe: Any, out: Path, emit: Emit, *, offline: bool) -> dict[str, Any]:
    from unlearn.curvature.spectrum import totals
    from unlearn.evals.curvature.describe import describe
    from unlearn.recipes.curvature import fit as fit_curvature

    curvature = fit_curvature(recipe, out, emit=emit, offline=offline)
    return describe(out, curvature, totals(curvature))


@app.command(
    epilog="Example: [bold]unlearn curvature inspect factors.safetensors --out spectra[/bold]"
)
def inspect(
    factors: Annotated[Path, typer.Argument(metavar="FACTORS", help="A file of fitted curvature.")],
    damping: Annotated[
        str,
        typer.Option(
            metavar="KIND:C",
            help="Damping to look at: factored, relative or absolute.",
        ),
    ] = "factored:1e-3",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="New folder for page, picture and figures."),
    ] = None,
    json: Json = False,
) -> None:
    """Say how curvature is spread over layers and directions, and what damping makes of it.

    Reads FACTORS alone. Layers 10,000 wide take minutes each on a CPU.
    """
    how = _damping(damping)
    if out:
        from unlearn.recipes.inputs import check_new

        check_new(out)
    with listening() as emit:
        emit({"event": "stage", "stage": "spectra"})
        found = _inspected(factors, how, emit)
    if out:
        from unlearn.evals.curvature.write import write_spectra

        write_spectra(out, found)
        found["out"] = str(out)
    say(found, json=json, people=_show)


def _damping(text: str) -> Any:
    from unlearn.curvature.damping import Damping
    from unlearn.errors import UserError

    try:
        return Damping.parse(text)
    except ValueError as error:
        raise UserError(f"--damping: {error}") from None


def _inspected(path: Path, damping: Any, emit: Emit) -> dict[str, Any]:
    import torch

    from unlearn.curvature.spectrum import spectra
    from unlearn.curvature.storage import read_curvature
    from unlearn.evals.curvature.describe import describe

    curvature = read_curvature(path)

    def tell(done: int, total: int) -> None:
        emit({"event": "progress", "what": "layers", "done": done, "total": total})

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = spectra(curvature, damping, device=device, progress=tell)
    return describe(path, curvature, layers, damping)


HOLDS = {
    "shape": "shape",
    "inputs_trace": "tr A",
    "outputs_trace": "tr G",
    "share": "share",
    "effective_rank": "eff. rank",
    "bytes": "memory",
}
DAMPED = {
    "damping": "λ",
    "damping_to_median": "λ/median",
    "to_median": "max/median",
    "damped_to_median": "damped",
    "to_smallest": "max/min",
    "damped_to_smallest": "damped",
}


def _show(found: dict[str, Any]) -> None:
    """Print all figures of all layers, in two tables that fit 80 columns."""
    console = _console()
    _print_facts(console, found)
    console.print(_table("What the layers hold", HOLDS, found))
    console.print()
    console.print(_table(f"Inverted with damping {found['damping']}", DAMPED, found))
    console.print(
        "[dim]share: of the trace of H. eff. rank: (Σλ)² / Σλ². max, median, min: eigenvalues of "
        "the layer's block of H, before and after damping.[/]"
    )
    _print_doubts(console, found)
    if found.get("out"):
        console.print(f"[bold]{'page':<11}[/]{found['out']}/curvature.html", soft_wrap=True)


def _show_fitted(found: dict[str, Any]) -> None:
    """Print what a fit has come to; eigenvalues are left to ``inspect``."""
    console = _console()
    _print_facts(console, found)
    quick = {key: title for key, title in HOLDS.items() if key != "effective_rank"}
    console.print(_table("What the layers hold", quick, found))
    _print_doubts(console, found)
    print(f"a run reads it with --set edit.factors={found['file']}")
    print(f"its eigenvalues: unlearn curvature inspect {found['file']}")


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _print_facts(console: Any, found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from unlearn.evals.curvature.describe import facts

    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts(found):
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)
    console.print()


def _print_doubts(console: Any, found: dict[str, Any]) -> None:
    from rich.markup import escape

    console.print()
    for text in found["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(text)}")
    for text in found["notes"]:
        console.print(f"[yellow]note:[/] {escape(text)}")


def _table(title: str, columns: dict[str, str], found: dict[str, Any]) -> Any:
    """Set layers out in the order of the model, the number of a block before its first.

    Columns that no layer has a figure for are left out: ``ekfac`` has no tr A.
    """
    from rich.table import Table

    from unlearn.cli.render import PLAIN
    from unlearn.evals.curvature.describe import cells

    rows = [cells(one) for one in found["layers"]]
    shown = {key: name for key, name in columns.items() if {row[key] for row in rows} != {"–"}}
    table = Table(title=title, **PLAIN)
    table.add_column("block", justify="right")
    table.add_column("layer")
    for heading in shown.values():
        table.add_column(heading, justify="right", no_wrap=True)
    before: str | None = None
    for row in rows:
        block = "" if row["block"] == before else row["block"]
        table.add_row(block, row["layer"], *(row[key] for key in shown))
        before = row["block"]
    return table
