"""``unlearn sae``: train a sparse dictionary of a layer's activations, look at one, export it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unlearn.cli.entry import Json, Offline, go_offline, naming, say
from unlearn.cli.options import Map
from unlearn.cli.progress import Emit, listening, number
from unlearn.cli.ranks import Nproc, joined_ranks, require_one_process, resumable, started
from unlearn.cli.recipe_option import RecipeFile
from unlearn.cli.sae_select import EPILOG as SELECTING
from unlearn.cli.sae_select import select

app = typer.Typer(
    help="Sparse autoencoders: dictionaries of what leaves a layer. Train one, look at one, choose "
    "features to clamp.",
    no_args_is_help=True,
)
app.command(epilog=SELECTING)(select)
KindName = Literal["relu", "topk", "batchtopk", "jumprelu", "gated", "mutual", "feature"]
Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="SOURCE", help="Texts: FILE, or FOLDER or hub name with #CONFIG, :SPLIT."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting of docs/sae.md (batch, buffer, lr, …); may be given again.",
    ),
]


Joined = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        help="How questions and answers are joined: 'Q: {question}\\nA: '; else the chat template.",
    ),
]


@app.command(
    epilog="Example: [bold]unlearn sae train models/target --data texts.jsonl --layer 2 "
    "--features 1024 --kind topk --k 32 --steps 2000 --out saes/layer2[/bold]"
)
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name.")],
    data: Data,
    layer: Annotated[
        int, typer.Option(min=0, metavar="N", help="Layer whose output is learnt; 0 is the first.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the dictionary.")],
    kind: Annotated[KindName, typer.Option(metavar="KIND", help="See docs/sae.md.")] = "topk",
    features: Annotated[
        int | None, typer.Option(min=1, metavar="F", help="Latents; 8 times the width.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="Active latents per token; 32.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps, of 4096 activations each; 5000.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn; 0.")] = None,
    map_: Map = None,
    template: Joined = None,
    set_: Settings = None,
    recipe: RecipeFile = None,
    nproc: Nproc = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Train a dictionary of what leaves layer N of MODEL on texts.

    Prints variance explained, L0, dead share and cross-entropy recovered on texts held out.

    When it was stopped, the same command goes on.
    """
    from unlearn.recipes.sae import OURS, settings_of
    from unlearn.recipes.training_folder import check_folder

    given = {"layer": layer, "kind": kind, "features": features, "k": k, "steps": steps}
    settings = settings_of({**given, "seed": seed}, set_ or [])
    check_folder(out, OURS)
    if started(nproc, out):
        return
    go_offline(offline)
    texts = _texts(model, data, map_, template, offline=offline)
    with joined_ranks() as first, listening(quiet=not first) as emit, naming(out), resumable(out):
        from unlearn.recipes.sae import train as train_into

        found = train_into(texts, settings, out, emit=_shown(emit))
    if first:
        say(found, json=json, people=_show)


@app.command(
    epilog="Example: [bold]unlearn sae inspect saes/layer2 --model models/target "
    "--data texts.jsonl[/bold]"
)
def inspect(
    dictionary: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of ours, or a public format's folder.")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also measure it on this model,")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="on these texts,")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="at this layer, if the file is silent.")
    ] = None,
    max_rows: Annotated[
        int, typer.Option(min=1, help="Rows of text that are measured, as long as in its training.")
    ] = 32,
    map_: Map = None,
    template: Joined = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Say what a dictionary is: kind, width, features, thresholds, lengths; with a model, how good.

    Reads our files, SAELens, Gemma Scope 1 and 2, Llama Scope, sparsify and dictionary_learning.
    """
    from unlearn.errors import UserError

    require_one_process("unlearn sae inspect")
    if (model is None) != (data is None):
        raise UserError("--model and --data go together", "give both, or neither")
    go_offline(offline)
    from unlearn.recipes.sae import described, measured
    from unlearn.sae.storage import load_dictionary

    loaded = load_dictionary(dictionary)
    found = described(loaded) | {"file": str(dictionary)}
    if model is not None and data is not None:
        texts = _texts(model, data, map_, template, offline=offline)
        with listening() as emit:
            found |= measured(
                loaded, texts, name=str(dictionary), layer=layer, max_rows=max_rows, emit=emit
            )
    say(found, json=json, people=_show)


@app.command(
    epilog="Example: [bold]unlearn sae export saes/layer2 --format saelens --out saes/lens[/bold]"
)
def export(
    dictionary: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of ours, or a public format's folder.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder.")],
    form: Annotated[
        Literal["saelens"], typer.Option("--format", metavar="FORMAT", help="saelens.")
    ] = "saelens",
    recipe: RecipeFile = None,
    json: Json = False,
) -> None:
    """Write a dictionary as SAELens reads it: cfg.json and sae_weights.safetensors."""
    require_one_process("unlearn sae export")
    from unlearn.recipes.sae import described
    from unlearn.sae.export import export as write
    from unlearn.sae.storage import load_dictionary

    write(load_dictionary(dictionary), out, form=form)
    say(described(load_dictionary(out)) | {"out": str(out)}, json=json, people=_show)


def _texts(
    model: str, data: str, map_: list[str] | None, template: str | None, *, offline: bool
) -> Any:
    from unlearn.cli.data import columns_of
    from unlearn.models import ModelSource
    from unlearn.recipes.sae import Texts

    joined = template.replace("\\n", "\n") if template is not None else None
    return Texts(ModelSource(model, offline=offline), data, columns_of(map_ or []), joined)


def _shown(emit: Emit) -> Emit:
    """Turn what a step tells into a line of progress."""

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "learnt":
            told = {name: event[f"sae/{name}"] for name in ("error", "l0", "dead")}
            what = f"error {told['error']:.3g}, L0 {told['l0']:.1f}, dead {told['dead']:.1%}, step"
            emit({"event": "progress", "what": what, "done": event["step"], "total": event["of"]})
        elif event["event"] == "resumed":
            emit({"event": "stage", "stage": f"going on after step {event['step']}"})
        elif event["event"] == "measured":
            explained = number(event.get("variance_explained"))
            said = f"training on; after step {event['step']} {explained} of the variance explained"
            emit({"event": "stage", "stage": said})
        else:
            emit(event)

    return show


MEASURES = {
    "variance_explained": "variance explained",
    "l0": "L0, active per token",
    "dead": "dead on these tokens",
    "dead_in_training": "dead in training",
    "ce_recovered": "cross-entropy recovered",
    "ce_base": "nats per token: model",
    "ce_dictionary": "  with the dictionary",
    "ce_zero": "  with zeros",
    "tokens": "tokens measured",
}


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    for name, value in _facts(found):
        console.print(f"[bold]{name:<25}[/]{escape(value)}")
    for text in found.get("doubts", ()):
        console.print(f"[yellow]warning:[/] {escape(text)}")


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    trained = f", trained as {found['trained_as']}" if found.get("trained_as") else ""
    facts = [
        ("dictionary", found.get("out") or found.get("file") or ""),
        ("kind", f"{found['kind']}{trained} ({found['format']} format)"),
        ("size", f"{found['features']:,} features of width {found['width']:,}"),
        ("place", f"{found['hook'] or 'not stated'} of {found['model'] or 'a model not named'}"),
        ("directions", f"length {_three(found['direction_lengths'])}"),
        ("bias", f"length {number(found['decoder_bias_length'])}"),
    ]
    facts += [("k", str(found["k"]))] if found["k"] else []
    facts += [("thresholds", _three(found["threshold"]))] if found["threshold"] else []
    metrics = found.get("metrics", {})
    shown = [(title, metrics[key]) for key, title in MEASURES.items() if key in metrics]
    return facts + [(name, f"{v:,}" if isinstance(v, int) else number(v)) for name, v in shown]


def _three(spread: dict[str, float]) -> str:
    low, middle, high = (number(spread[name]) for name in ("min", "median", "max"))
    return f"{low} to {high}, median {middle}"
