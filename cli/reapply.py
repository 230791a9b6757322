"""``unlearn reapply``: add what an edit has changed to another model, for instance a later one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import Emit, listening

EPILOG = (
    "Example: [bold]unlearn reapply runs/a/update.safetensors --model models/tuned --scale search "
    "--forget people#forget --retain people#retain --forget-nll 3 --retain-kl 0.1 "
    "--out models/again[/bold]"
)
SEARCH = "search"
SEARCHED = "When the scale is searched"

Source = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="Rows that are measured, as in a run.", rich_help_panel=SEARCHED
    ),
]


def reapply(
    update: Annotated[
        Path, typer.Argument(metavar="UPDATE", help="The update.safetensors of a run.")
    ],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Folder or hub name of the model to change.")
    ],
    scale: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|search",
            help="How much of it: a number, or search, which measures and begins with 0.25.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the model.")],
    forget: Source = None,
    retain: Source = None,
    forget_nll: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Goal: mean forget loss, per token.",
            rich_help_panel=SEARCHED,
        ),
    ] = None,
    retain_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Bound on the KL from MODEL on the retain rows, per token.",
            rich_help_panel=SEARCHED,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of the recipe reapply: data.template=…",
            rich_help_panel=SEARCHED,
        ),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Add what an edit changed to a model of the same shape, after it was trained further."""
    measured = {"--forget": forget, "--retain": retain, "--forget-nll": forget_nll,
                "--retain-kl": retain_kl, "--set": set_}  # fmt: skip
    number = _scale(scale, measured)
    _check_places(update, model, out)
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        if number is not None:
            result = _reapply(update, model, number, out, emit, offline=offline)
        else:
            edit = {"update": str(update), "scale": SEARCH, "forget_nll": forget_nll,
                    "retain_kl": retain_kl}  # fmt: skip
            changes = {
                "model": {"path": model},
                "data": {"forget": forget, "retain": retain},
                "edit": edit,
                "out": str(out),
            }
            result = _searched(changes, set_ or [], out, emit, offline=offline)
    say(result, json=json, people=_show)


def _scale(scale: str, measured: dict[str, Any]) -> float | None:
    """Give the number, or None for a search; refuse options that do not belong to it.

    Raises:
        UserError: no number, or options that are too many or missing.
    """
    from unlearn.errors import UserError

    given = [name for name, value in measured.items() if value not in (None, [])]
    if scale == SEARCH:
        missing = [name for name in ("--forget", "--retain") if name not in given]
        if missing:
            raise UserError(
                f"--scale search measures, but {' and '.join(missing)} is missing",
                "give --forget and --retain, as in the run that made the update",
            )
        if "--forget-nll" not in given and "--retain-kl" not in given:
            raise UserError(
                "--scale search needs a goal", "give --forget-nll NATS, --retain-kl NATS, or both"
            )
        for name in ("--forget-nll", "--retain-kl"):
            if name in given and not measured[name] > 0:
                raise UserError(f"{name} {measured[name]:g} given", "give a number above 0")
        return None
    try:
        number = float(scale)
    except ValueError as error:
        raise UserError(
            f"--scale {scale} given", "give a number, for instance 0.25, or search"
        ) from error
    if given:
        raise UserError(
            f"{given[0]} given with --scale {scale}: nothing is measured then",
            "leave it out, or give --scale search",
        )
    return number


def _check_places(update: Path, model: str, out: Path) -> None:
    """Refuse what is missing, or in the way, before anything slow is imported."""
    from unlearn.errors import UserError
    from unlearn.recipes.inputs import check_model_folder, check_update_file

    if out.exists():
        raise UserError(f"output folder '{out}' already exists", "choose another --out")
    check_update_file(str(update))
    check_model_folder(model)


def _reapply(
    place: Path, path: str, scale: float, out: Path, emit: Emit, *, offline: bool
) -> dict[str, Any]:
    from unlearn import models
    from unlearn.edits.update import check_fits, check_scale, is_start, load_update, update_shapes
    from unlearn.edits.update import reapply as add
    from unlearn.edits.weightless import weightless

    check_scale(scale)
    source = models.ModelSource(path, offline=offline)
    check_fits(weightless(source), update_shapes(place))
    tokenizer = models.load_tokenizer(source)
    emit({"event": "stage", "stage": "load"})
    found, model = load_update(place), models.load_model(source)
    began = is_start(model, found)
    add(model, found, scale=scale)
    _save(model, tokenizer, out, emit)
    return {
        "model": str(out),
        "update": str(place),
        "scale": scale,
        "edit": found.about.get("edit"),
        "weights": len(found.weights),
        "is_start": began,
    }


def _searched(
    changes: dict[str, Any], overrides: list[str], out: Path, emit: Emit, *, offline: bool
) -> dict[str, Any]:
    """Do what the recipe ``reapply`` does to a model, without a run folder."""
    from unlearn import models
    from unlearn.edits import EDITS
    from unlearn.recipes.files import load
    from unlearn.recipes.inputs import check_early
    from unlearn.recipes.prepare import prepare

    check_early("reapply", overrides, changes)
    prepared = prepare(load("reapply", overrides, changes), offline=offline)
    emit({"event": "stage", "stage": "load"})
    model = models.load_model(prepared.source)
    told: dict[str, Any] = {}

    def hear(event: dict[str, Any]) -> None:
        told.update(event if event["event"] == "update" else {})
        if event["event"] not in ("update", "trial"):
            emit(event)

    section = prepared.recipe.edit
    assert section is not None
    emit({"event": "stage", "stage": "edit", "name": section.name})
    rows = {name: stream.examples for name, stream in prepared.streams.items()}
    model = EDITS[section.name](model, {"data": rows, "listen": hear}, **section.hyper)
    _save(model, prepared.tokenizer, out, emit)
    kept = ("scale", "is_start", "start", "trials", "missed", "changed_share", "rounding")
    return {
        "model": str(out),
        "update": section.hyper["update"],
        "edit": told["origin"].get("edit"),
        "weights": len(told["weights"]),
        **{key: told[key] for key in kept},
    }


def _save(model: Any, tokenizer: Any, out: Path, emit: Emit) -> None:
    from unlearn import models
    from unlearn.runs import staged

    emit({"event": "stage", "stage": "save"})
    with staged(out) as staging:
        models.save_model(model, tokenizer, staging, out.with_name(f"{out.name}-adapter"))


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console

    same = "the weights it began with" if result["is_start"] else "other weights than it began with"
    if "trials" in result:
        show_trials(Console(), result)
    print(
        f"{result['edit']} x {result['scale']:.4g} was added to {result['weights']} weights "
        f"({same})\nmodel  {result['model']}"
    )
    if "trials" not in result:
        print(
            "What it does to this model is not known before it is measured: see unlearn eval --help"
        )
    elif result["missed"]:
        print(f"note: a goal was missed {result['missed']}")


def show_trials(console: Any, found: dict[str, Any]) -> None:
    """Set out what was measured at each scale; the one that was taken is marked."""
    from rich.table import Table

    from unlearn.cli.render import PLAIN

    table = Table(**PLAIN)
    for name in ("scale", "forget NLL", "retain KL", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for one in [{"scale": 0.0, **found["start"]}, *found["trials"]]:
        mark = "taken" if one["scale"] == found["scale"] else ""
        numbers = (f"{one['scale']:.4g}", f"{one['forget/nll']:.3f}", f"{one['retain/kl']:.4f}")
        table.add_row(*numbers, mark, style="bold" if mark else None)
    console.print("[bold]scales that were tried[/] (nats per token)")
    console.print(table)
