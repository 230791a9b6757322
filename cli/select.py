"""``unlearn data select``, and the options with which a run trains on a part of its forget set."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.recipes.choice import Selector

PART = "A part of the forget set"
EPILOG = (
    "Example: [bold]unlearn data select forget.jsonl --model models/target --by mink "
    "--fraction 0.05 --out part.json[/bold]"
)

By = Annotated[
    Selector | None,
    typer.Option(
        "--forget-select",
        metavar="BY",
        help="Train on a part only: random, grand, moderate, mink, keyword or worst.",
        rich_help_panel=PART,
    ),
]
Fraction = Annotated[
    float | None,
    typer.Option(
        "--forget-fraction",
        metavar="SHARE",
        help="Share of the rows, above 0 and at most 1.",
        rich_help_panel=PART,
    ),
]
Indices = Annotated[
    Path | None,
    typer.Option(
        "--forget-indices",
        metavar="FILE",
        help="Rows to train on: a file of `data select`, or a JSON list of row numbers.",
        rich_help_panel=PART,
    ),
]


def choice_changes(by: str | None, fraction: float | None, indices: Path | None) -> dict[str, Any]:
    """Give the keys of ``data.select`` that these options set."""
    given = {"by": by, "fraction": fraction, "manifest": indices and str(indices)}
    return {key: value for key, value in given.items() if value is not None}


def select(
    forget: Annotated[str, typer.Argument(metavar="FORGET", help="The forget set, as in a run.")],
    model: Annotated[str, typer.Option(help="Folder or hub name of the model to change.")],
    by: Annotated[Selector, typer.Option(help="random, grand, moderate, mink, keyword or worst.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="New JSON file for the rows.")],
    fraction: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of the rows that is kept.")
    ] = None,
    retain: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The retain set, where it is needed.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Whose loss grand and worst take: npo, or a file."),
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=COLUMN", help="Read NAME from COLUMN: question=q."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key: data.select.k=0.2."),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Choose the part of FORGET to train on; write rows, scores and settings to a file."""
    from unlearn.cli.data import columns_of
    from unlearn.cli.progress import listening

    _check(by, recipe, out)
    go_offline(offline)
    data: dict[str, Any] = {"forget": forget, "select": choice_changes(by, fraction, None)}
    data |= {"retain": retain} if retain else {}
    data |= {"columns": columns_of(map_)} if map_ else {}
    changes = {"model": {"path": model}, "data": data, "out": str(out)}
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        found = _chosen(recipe or "grad_ascent", set_ or [], changes, emit, offline=offline)
        found.write(out)
    summary = found.summary() | {"out": str(out)}
    say(summary, json=json, people=_print)


def _check(by: str, recipe: str | None, out: Path) -> None:
    """Refuse what would only be noticed at the end.

    Raises:
        UserError: the file exists, or a selector lacks the loss it is about.
    """
    from unlearn.errors import UserError

    if out.exists():
        raise UserError(f"'{out}' already exists", "choose another --out, or remove it")
    if by in ("grand", "worst") and recipe is None:
        raise UserError(f"{by} needs the loss it is about", "give --recipe, for instance npo")


def _chosen(
    recipe: str, overrides: list[str], changes: dict[str, Any], emit: Any, *, offline: bool
) -> Any:
    """Load the model and choose; give a ``Selected``."""
    from unlearn import models
    from unlearn.recipes.files import load
    from unlearn.recipes.inputs import check_early
    from unlearn.recipes.prepare import prepare
    from unlearn.recipes.selectors import check_choice
    from unlearn.recipes.selectors import select as choose

    check_early(recipe, overrides, changes)
    prepared = prepare(load(recipe, overrides, changes), offline=offline)
    check_choice(prepared)
    emit({"event": "stage", "stage": "load"})
    model = models.load_model(prepared.source)
    return choose(prepared, model, weights_hash=models.weights_hash(model), emit=emit)


def _print(found: dict[str, Any]) -> None:
    labels = f", {found['labels']} tokens in them" if "labels" in found else ""
    print(f"{found['rows']} of {found['of']} rows by {found['by']}{labels}")
    shown = ", ".join(map(str, found["indices"][:12]))
    more = ", …" if len(found["indices"]) > 12 else ""
    print(f"rows {shown}{more}")
    print(f"file {found['out']}")
