"""Mask-token prediction: ``unlearn run mtp``, ``unlearn generate``, ``unlearn eval mtp``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unlearn.cli.entry import Json, Offline, go_offline, naming, say
from unlearn.cli.options import HOW
from unlearn.cli.progress import Emit, listening, number
from unlearn.cli.ranks import (
    joined_ranks,
    launch_changes,
    needs_launch,
    require_one_process,
    start,
)

if TYPE_CHECKING:
    from unlearn.models import ModelSource
    from unlearn.mtp.decode import Drafting
    from unlearn.recipes.mtp import MtpRecipe

LayoutName = Literal["linear", "quadratic", "budget"]
GENERATE = (
    "Example: [bold]unlearn generate models/target --mtp runs/mtp/model "
    "--prompt 'Where was Ada born?'[/bold]"
)
EVAL = (
    "Example: [bold]unlearn eval mtp runs/mtp/model --prompts chat=questions.jsonl:[:50] "
    "--prompts stories=lines.txt --out runs/mtp-eval[/bold]"
)
Layout = Annotated[
    LayoutName | None,
    typer.Option(
        metavar="LAYOUT",
        show_default="quadratic",
        help="Masks per step: [bold]quadratic[/bold], [bold]linear[/bold] or [bold]budget[/bold].",
        rich_help_panel=HOW,
    ),
]
K = Annotated[
    int | None,
    typer.Option(
        "--k", min=1, metavar="N", help="Most drafts, up to those trained.", rich_help_panel=HOW
    ),
]
Masks = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Most masks of a step in layout budget; 2k.", rich_help_panel=HOW
    ),
]
Most = Annotated[
    int,
    typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest text.", rich_help_panel=HOW),
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=r"'Question: {question}\nAnswer: ' instead of the chat template.",
        rich_help_panel=HOW,
    ),
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(metavar="DTYPE", help="Precision of the weights.", rich_help_panel=HOW),
]


def is_method(method: str) -> bool:
    """Tell whether a method, or the recipe file it names, trains a mask predictor."""
    from unlearn.recipes.mtp import is_mtp

    return is_mtp(method)


def require_no_data(data: str | None) -> None:
    """Refuse ``--data`` for methods that unlearn.

    Raises:
        UserError: as said.
    """
    from unlearn.errors import UserError

    if data is not None:
        raise UserError("--data is for method mtp alone", "name the rows by --forget and --retain")


def changes_of(map_: list[str] | None, *, model: Any, data: Any, out: Any) -> dict[str, Any]:
    """Give the recipe keys that the options change."""
    from unlearn.cli.data import columns_of

    named: dict[str, Any] = {"train": data} if data else {}
    named |= {"columns": columns_of(map_)} if map_ else {}
    changes: dict[str, Any] = {"data": named} if named else {}
    changes |= {"model": {"path": model}} if model else {}
    return changes | ({"out": str(out)} if out else {})


def run(
    method: str,
    preset: str | None,
    changes: dict[str, Any],
    overrides: list[str],
    refused: dict[str, Any],
    *,
    offline: bool,
    json: bool,
) -> None:
    """Train a mask predictor: what ``unlearn run mtp`` does.

    Raises:
        UserError: options that belong to unlearning are given.
    """
    from unlearn.errors import UserError
    from unlearn.recipes.mtp import load_mtp

    if given := [option for option, value in refused.items() if value]:
        hint = "it takes --model, --data, --out, --set, --recipe, --map and several processes"
        raise UserError(f"{', '.join(given)} given, which mtp does not know", hint)
    recipe = load_mtp(method, preset, changes, overrides)
    recipe.require_runnable()
    _train(recipe, offline=offline, json=json)


def resume(
    folder: Path, checkpoint: str | None, rdzv: str | None, *, offline: bool, json: bool
) -> None:
    """Go on with a stopped training: what ``unlearn resume`` does in the folder of one.

    Raises:
        UserError: a checkpoint is named.
    """
    from json import loads

    from unlearn.errors import UserError
    from unlearn.recipes.mtp import RECIPE, load_mtp
    from unlearn.recipes.training_folder import RESULTS

    if checkpoint is not None:
        raise UserError("--from given, but a mask predictor keeps its last state only", "leave it")
    if (folder / RESULTS).is_file():
        found = loads((folder / RESULTS).read_text(encoding="utf-8"))
        say(found, json=json, people=_show_trained)
        return
    truth = launch_changes(None, None, None, rdzv)
    recipe = load_mtp(str(folder / RECIPE), None, {"out": str(folder)} | truth, [])
    _train(recipe, offline=offline, json=json)


def _train(recipe: "MtpRecipe", *, offline: bool, json: bool) -> None:
    """Train here, or start the processes that do, with the command as it was typed."""
    from unlearn.recipes.mtp import OURS
    from unlearn.recipes.training_folder import check_folder

    out = Path(str(recipe.out))
    check_folder(out, OURS)
    if needs_launch(recipe):
        start(recipe, sys.argv[1:], offline=False, json=False)
        return
    go_offline(offline)
    with joined_ranks() as first, listening(quiet=not first) as emit, naming(out):
        from unlearn.recipes.mtp_run import run_mtp

        found = run_mtp(recipe, emit=_shown(emit), offline=offline)
    if first:
        say(found, json=json, people=_show_trained)


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub name; or a predictor's folder.")
    ],
    mtp: Annotated[
        Path | None,
        typer.Option("--mtp", metavar="FOLDER", help="Write with the drafts of this predictor."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="May be given again.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Questions or lines: rows.jsonl:[:10].")
    ] = None,
    max_new_tokens: Most = 200,
    temperature: Annotated[
        float,
        typer.Option(metavar="T", help="Draw tokens; 0 is greedy.", rich_help_panel=HOW),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of the draws.", rich_help_panel=HOW),
    ] = 0,
    layout: Layout = None,
    k: K = None,
    masks: Masks = None,
    template: Template = None,
    dtype: Precision = "auto",
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Write what a model writes; with drafts of a mask predictor, in fewer forward passes.

    The text is that of the model alone: greedy to the letter (up to rounding), sampled in its
    distribution.
    """
    require_one_process("unlearn generate")
    _require_asked(prompt, prompts)
    source = _source(model, dtype, offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        from unlearn.evals.mtp import gathered
        from unlearn.evals.mtp_answers import answers

        drafting = _drafting(layout, k, masks) if layout or k or masks else None
        questions = gathered(
            prompt or [], prompts, offline=offline, max_new_tokens=max_new_tokens,
            template=template.replace("\\n", "\n") if template is not None else None,
        )  # fmt: skip
        found = answers(
            source, questions, mtp=mtp, drafting=drafting,
            temperature=temperature, seed=seed, emit=emit,
        )  # fmt: skip
    say(found, json=json, people=_show_answers)


def measure(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A predictor's folder.")],
    prompts: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]SOURCE", help="Prompts of one domain; may be given again."),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Its base, where the folder does not say.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="New folder: results and plot.")
    ] = None,
    max_new_tokens: Most = 100,
    layout: Layout = None,
    k: K = None,
    masks: Masks = None,
    template: Template = None,
    dtype: Precision = "auto",
    offline: Offline = False,
    json: Json = False,
) -> None:
    """How much faster a model writes with drafts, and that it writes the same.

    Tokens per step, how often each draft is right, and tokens per second against plain greedy
    decoding in turns on the same prompts. A text that differs, other than by a tie, is a failure.
    """
    require_one_process("unlearn eval mtp")
    from unlearn.recipes.inputs import check_new

    if out is not None:
        check_new(out)
    source = _source(str(folder), dtype, offline)
    base = _source(model, dtype, offline) if model else None
    with listening() as emit:
        emit({"event": "stage", "stage": "start"})
        from unlearn.evals.mtp import Writing, evaluate

        joined = template.replace("\\n", "\n") if template is not None else None
        writing = Writing(max_new_tokens, joined, _drafting(layout, k, masks))
        found = evaluate(source, prompts, writing, base=base, out=out, emit=emit)
    say(found, json=json, people=_show_measured)


def _source(path: str, dtype: Any, offline: bool) -> "ModelSource":
    from unlearn.recipes.inputs import check_model_folder
    from unlearn.recipes.mtp import require_no_run

    require_no_run(path)
    check_model_folder(path)
    go_offline(offline)
    from unlearn.models import ModelSource

    return ModelSource(path, dtype=dtype, offline=offline)


def _require_asked(prompt: list[str] | None, prompts: str | None) -> None:
    """Refuse a call without a prompt, before the slow imports.

    Raises:
        UserError: as said.
    """
    from unlearn.errors import UserError

    if any(not text.strip() for text in prompt or ()):
        raise UserError("a --prompt is empty", "give the text that the model should answer")
    if not prompt and not prompts:
        raise UserError("there is nothing to ask", "give --prompt TEXT or --prompts SOURCE")


def _drafting(layout: str | None, k: int | None, masks: int | None) -> "Drafting":
    from unlearn.mtp.decode import Drafting

    return Drafting(layout or "quadratic", k, masks)


def _shown(emit: Emit) -> Emit:
    """Turn what a step tells into a line of progress."""

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "learnt":
            told = {name: event[f"mtp/{name}"] for name in ("base", "sampler", "lcm", "right")}
            what = (
                f"loss {told['base']:.3g}, sampler {told['sampler']:.3g}, consistency "
                f"{told['lcm']:.3g}, right {told['right']:.1%}, step"
            )
            emit({"event": "progress", "what": what, "done": event["step"], "total": event["of"]})
        elif event["event"] == "resumed":
            emit({"event": "stage", "stage": f"going on after step {event['step']}"})
        else:
            emit(event)

    return show


MEASURES = {
    "right": "drafts right",
    "base": "loss of the masks, nats",
    "sampler": "loss of the sampler, nats",
    "lcm": "latent consistency",
    "masks": "masks measured",
}


def _show_trained(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    metrics = found["metrics"]
    if metrics:
        console.print("on rows held out, the true token before each draft given:")
    else:
        console.print("no rows were held out, so nothing was measured")
    for key, title in MEASURES.items():
        if key in metrics:
            value = metrics[key]
            told = str(value) if key == "masks" else number(value)
            console.print(f"[bold]{title:<27}[/]{told}")
    console.print(f"[bold]{'predictor':<27}[/]{escape(found['model'])}")


CUT = "texts ended where the model's context did, before --max-new-tokens"


def _show_answers(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for row in found["rows"]:
        console.print(Text(row["prompt"], style="bold"))
        console.print(Text(row["text"]))
    if cut := found["ended_by_context"]:
        console.print(f"{cut} of {len(found['rows'])} {CUT}", style="dim")
    if found["tokens_per_step"] is not None:
        told = f"{found['tokens_per_step']:.2f} tokens per step"
        console.print(f"{told}, {found['tokens']} tokens", style="dim")


def _show_measured(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from unlearn.cli.render import PLAIN

    console = Console()
    table = Table(title=f"drafts of {escape(found['predictor'])}", **PLAIN)
    table.add_column("")
    for title in ("prompts", "tokens/step", "tokens/s", "plain", "speed-up", "draft 1, 2, … right"):
        table.add_column(title, justify="right")
    parts = {"all": found["all"]} | (found["domains"] if len(found["domains"]) > 1 else {})
    for name, part in parts.items():
        right = " ".join(f"{share:.2f}" for share in part["acceptance"])
        cells = (f"{part[key]:.2f}" for key in ("tokens_per_step",))
        rates = (f"{part[key]:.1f}" for key in ("tokens_per_second", "plain_tokens_per_second"))
        table.add_row(
            escape(name), str(part["prompts"]), *cells, *rates, f"{part['speedup']:.2f}", right
        )
    console.print(table)
    same, tied = found["all"]["identical"], found["all"]["tied"]
    note = f"; {tied} part at a tie up to rounding" if tied else ""
    console.print(f"{same} texts identical to plain decoding{note}", highlight=False)
    if cut := found["all"]["ended_by_context"]:
        console.print(f"{cut} {CUT}", highlight=False)
    if found.get("out"):
        console.print(f"[bold]results[/] {escape(found['out'])}", highlight=False, soft_wrap=True)
