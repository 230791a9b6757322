"""Options that the commands about runs share: what is run, and how."""

from pathlib import Path
from typing import Annotated

import typer

GIVEN, HOW = "What is run", "How it is run"

Method = Annotated[
    str,
    typer.Argument(
        metavar="METHOD",
        help="A method ([bold]npo[/bold], …), a preset ([bold]tofu-tiny/npo[/bold]) or a file.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Folder or hub name of the model to change.", rich_help_panel=GIVEN
    ),
]
Forget = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Rows to forget: FILE, or FOLDER or hub name with #CONFIG and :SPLIT.",
        rich_help_panel=GIVEN,
    ),
]
Retain = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Rows to keep, in the same form.", rich_help_panel=GIVEN),
]
Pairs = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="To post-train: rows with a chosen and a rejected answer.",
        rich_help_panel=GIVEN,
    ),
]
Text = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="To post-train: rows to train on.", rich_help_panel=GIVEN),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="For METHOD mtp, instead of both: texts, in the same form.",
        rich_help_panel=GIVEN,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="New folder for the run.", rich_help_panel=GIVEN),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="Preset or recipe file with the settings for METHOD.",
        rich_help_panel=HOW,
    ),
]
Lora = Annotated[
    bool,
    typer.Option("--lora", metavar="", help="Train low-rank adapters only.", rich_help_panel=HOW),
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="NAME=COLUMN",
        help="Read NAME from COLUMN of the files: question=q. May be given again.",
        rich_help_panel=GIVEN,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one recipe key; may be given again. `recipes show npo --resolved` lists them.",
        rich_help_panel=HOW,
    ),
]
