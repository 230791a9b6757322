"""``unlearn edit``: what changes between two models, as an update that can be added to others."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening

MOST_ROWS = 10
"""Weights in the table; JSON has them all."""
EPILOG = (
    "Example: [bold]unlearn edit diff models/start models/edited --out update.safetensors[/bold]"
)

app = typer.Typer(help="Changes of weights as files.", no_args_is_help=True)


@app.callback()
def edit() -> None:
    """Keep the name of the command in front, while there is only one."""


@app.command(epilog=EPILOG)
def diff(
    start: Annotated[str, typer.Argument(metavar="START", help="The model before the change.")],
    edited: Annotated[str, typer.Argument(metavar="EDITED", help="The model after it.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="New .safetensors file.")],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="R", help="Keep matrices as factors of this rank: smaller, not exact."
        ),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Make the update that turns START into EDITED: added once, it gives EDITED exactly."""
    _check_places(start, edited, out)
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        result = _diff(start, edited, out, rank, emit, offline=offline)
    say(result, json=json, people=_show)


def _check_places(start: str, edited: str, out: Path) -> None:
    from unlearn.errors import UserError
    from unlearn.recipes.inputs import check_model_folder

    if out.exists():
        raise UserError(f"'{out}' already exists", "choose another --out, or remove it")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} given", "give a file that ends in .safetensors")
    for path in (start, edited):
        check_model_folder(path)


def _diff(
    start: str, edited: str, out: Path, rank: int | None, emit: Any, *, offline: bool
) -> dict[str, Any]:
    from unlearn import models
    from unlearn.edits.difference import between, check_alike, described
    from unlearn.edits.update import save_update
    from unlearn.edits.weightless import weightless

    # as fp32, which holds what bf16 and fp16 hold; differences are exact only between exact values
    sources = [models.ModelSource(path, "float32", offline=offline) for path in (start, edited)]
    check_alike(*(weightless(source) for source in sources))
    emit({"event": "stage", "stage": "load"})
    before, after = (models.load_model(source, device="cpu") for source in sources)
    emit({"event": "stage", "stage": "edit", "name": "difference"})
    update = between(before, after)
    if rank is not None:
        update = update.of_rank(rank)
    found = described(before, after, update)
    save_update(update, out)
    return {"update": str(out), "bytes": out.stat().st_size, **found}


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from unlearn.cli.progress import size
    from unlearn.cli.render import PLAIN

    table = Table(title="what changed most", expand=False, **PLAIN)
    table.add_column("weight", overflow="fold")
    for name in ("shape", "norm", "of start", "changed"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found["layers"][:MOST_ROWS]:
        relative = "–" if one["relative"] is None else f"{one['relative']:.2%}"
        shape = " x ".join(map(str, one["shape"]))
        table.add_row(one["weight"], shape, f"{one['norm']:.4g}", relative,
                      f"{one['changed_share']:.1%}")  # fmt: skip
    console = Console()
    console.print(table)
    for line in _lines(found):
        console.print(line, highlight=False)
    print(f"update  {found['update']} ({size(found['bytes'])})")


def _lines(found: dict[str, Any]) -> list[str]:
    shares = found["changed_share"], found["changed_share_bfloat16"]
    lines = [
        f"{found['weights']} of {found['of']} weights differ, in {shares[0]:.1%} of their values "
        f"({shares[1]:.1%} in bfloat16)",
        f"norm of the update: {found['relative']:.3%} of that of the start",
    ]
    if found["rank"]:
        lines.append(
            f"of rank {found['rank']} at most: {found['relative_error']:.2%} of its norm is lost, "
            "so that START + update is not quite EDITED"
        )
    return lines
