"""``unlearn sae select``: features of a dictionary that could be clamped, for a person to judge."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.options import Map
from unlearn.cli.progress import listening
from unlearn.cli.ranks import require_one_process

EPILOG = (
    "Example: [bold]unlearn sae select models/target --dictionary saes/layer2 "
    "--forget forget.jsonl --retain retain.jsonl --out features.json[/bold]"
)
SHOWN = 3
"""Passages of each feature on the screen; JSON has more."""


def select(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name.")],
    dictionary: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="Dictionary of one layer; again for another layer."),
    ],
    forget: Annotated[str, typer.Option(metavar="SOURCE", help="Rows to forget.")],
    retain: Annotated[str, typer.Option(metavar="SOURCE", help="Rows to keep.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="New JSON file, for --set edit.selected=FILE."),
    ] = None,
    features: Annotated[int, typer.Option(min=1, help="How many of each dictionary.")] = 20,
    tau: Annotated[
        float, typer.Option(min=0, max=1, help="They fire on less than this of retain tokens.")
    ] = 0.01,
    exclude: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Never this feature; may be repeated.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Layer, if the file does not say.")
    ] = None,
    map_: Map = None,
    template: Annotated[
        str | None,
        typer.Option("--template", metavar="TEXT", help="Prompt with {question}, as in a recipe."),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Choose features that fire on the forget set and hardly on the retain set.

    Prints each with how often it fires on both, and the passages where it is strongest.
    """
    from unlearn.errors import UserError

    require_one_process("unlearn sae select")
    if out is not None and out.exists():
        raise UserError(f"'{out}' already exists", "choose another --out, or remove it")
    go_offline(offline)
    from unlearn.cli.data import columns_of
    from unlearn.models import ModelSource
    from unlearn.recipes import sae_select

    joined = template.replace("\\n", "\n") if template is not None else None
    sets = sae_select.Sets(forget, retain, columns_of(map_ or []), joined)
    with listening() as emit:
        found = sae_select.select(
            ModelSource(model, offline=offline), dictionary, sets, features=features, tau=tau,
            exclude=exclude or (), layer=layer, emit=emit,
        )  # fmt: skip
    if out is not None:
        sae_select.write(found, out)
    say(found | ({"out": str(out)} if out else {}), json=json, people=_show)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for one in found["dictionaries"]:
        console.print(_table(one, found))
    if "out" in found:
        print(f"features  {found['out']}  (unlearn run sae --set edit.selected={found['out']} …)")


def _table(one: dict[str, Any], found: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from unlearn.cli.progress import number
    from unlearn.cli.render import PLAIN

    title = (
        f"{len(one['features'])} features of layer {one['layer']} that fire on less than "
        f"{found['tau']:g} of the retain tokens"
    )
    table = Table(title=title, caption=f"99th percentile of their activations {number(one['p99'])}",
                  caption_justify="left", **PLAIN)  # fmt: skip
    for name in ("feature", "forget", "retain", "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("strongest on", ratio=1)
    for feature in one["features"]:
        texts = [_passage(passage) for passage in feature["examples"][:SHOWN]]
        shares = (f"{feature[name]:.2%}" for name in ("forget", "retain"))
        table.add_row(str(feature["id"]), *shares, number(feature["mean"]), Text("\n").join(texts))
    return table


def _passage(found: dict[str, Any]) -> Any:
    """Show a passage on one line, the token in bold."""
    from rich.text import Text

    before, after = found["before"].replace("\n", " "), found["after"].replace("\n", " ")
    token = f"«{found['token']}»".replace("\n", "↵")
    parts = ((before[-30:], "dim"), (token, "bold"), (after[:15], "dim"))
    return Text.assemble(*((_printable(text), style) for text, style in parts))


def _printable(text: str) -> str:
    """Show characters that would steer the terminal as dots."""
    return "".join(c if c.isprintable() or c.isspace() else "\N{MIDDLE DOT}" for c in text)
