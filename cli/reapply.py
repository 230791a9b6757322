"""``unlearn reapply``: add what an edit has changed to another model, for instance a later one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening

EPILOG = (
    "Example: [bold]unlearn reapply runs/a/update.safetensors --model models/tuned --scale 0.25 "
    "--out models/again[/bold]"
)


def reapply(
    update: Annotated[
        Path, typer.Argument(metavar="UPDATE", help="The update.safetensors of a run.")
    ],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Folder or hub name of the model to change.")
    ],
    scale: Annotated[
        float,
        typer.Option(metavar="NUMBER", help="How much of it; begin with 0.25, and measure."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the model.")],
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Add what an edit changed to a model of the same shape, after it was trained further."""
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "load"})
        result = _reapply(update, model, scale, out, offline=offline)
    say(result, json=json, people=_show)


def _reapply(place: Path, path: str, scale: float, out: Path, *, offline: bool) -> dict[str, Any]:
    from unlearn import models
    from unlearn.edits.update import is_start, load_update
    from unlearn.edits.update import reapply as add
    from unlearn.errors import UserError
    from unlearn.kinds import require_plain
    from unlearn.runs import staged

    if out.exists():
        raise UserError(f"output folder '{out}' already exists", "choose another --out")
    found = load_update(place)
    source = models.ModelSource(path, offline=offline)
    models.check_source(source)
    require_plain(source)
    tokenizer = models.load_tokenizer(source)
    model = models.load_model(source)
    began = is_start(model, found)
    add(model, found, scale=scale)
    with staged(out) as staging:
        models.save_model(model, tokenizer, staging, out.with_name(f"{out.name}-adapter"))
    return {
        "model": str(out),
        "update": str(place),
        "scale": scale,
        "edit": found.about.get("edit"),
        "weights": len(found.weights),
        "is_start": began,
    }


def _show(result: dict[str, Any]) -> None:
    same = "the weights it began with" if result["is_start"] else "other weights than it began with"
    print(
        f"{result['edit']} x {result['scale']:g} was added to {result['weights']} weights "
        f"({same})\nmodel  {result['model']}"
    )
    print("What it does to this model is not known before it is measured: unlearn eval …")
