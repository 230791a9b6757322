"""``detect-pretraining`` and ``unlearn detect``: was this text in a model's training data?"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from unlearn.cli import detect_audit, detect_bench, detect_calibrate, detect_decide, detect_freq
from unlearn.cli.detect_options import explaining_stops
from unlearn.cli.entry import Json, Offline, go_offline, guarded
from unlearn.cli.progress import listening

TEXTS, SCORES, WINDOWS = "The texts", "The scores", "Documents (text files read in windows)"
NOTHING_SCORED = 5
"""Exit code when no text had a token to score."""


class ScoreByDefault(typer.core.TyperGroup):
    """A group whose command ``score`` need not be named: ``detect FILE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name in where the first word is no command and no call for help."""
        first = args[0] if args else ""
        if first and first not in self.commands and first not in ("-h", "--help"):
            args = ["score", *args]
        return list(super().parse_args(ctx, args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Name the commands, and below them show how to score: what most people came for."""
        super().format_help(ctx, formatter)
        score = self.commands["score"]
        score.format_help(score.context_class(score, info_name="score", parent=ctx), formatter)


app = typer.Typer(
    cls=ScoreByDefault,
    help="Was a text in a model's training data? `detect-pretraining FILE --model MODEL` scores "
    "texts; higher means more likely. Its options are shown below.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def group() -> None:
    """Have a place for the commands, also while there is only one."""


def _text(name: str, metavar: str, help_: str, panel: str | None = None) -> Any:
    return typer.Option(name, metavar=metavar, help=help_, rich_help_panel=panel)


@app.command(
    epilog="Example: [bold]detect-pretraining passages.jsonl --model models/target --json[/bold]"
)
def score(
    ctx: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="txt, md, jsonl, json, csv, tsv or parquet (also .gz), a folder, or - for stdin.",
        ),
    ] = None,
    model: Annotated[
        str | None, _text("--model", "MODEL", "Folder or hub name of the model that is asked.")
    ] = None,
    revision: Annotated[
        str | None, _text("--revision", "NAME", "Branch, tag or commit of a hub model.")
    ] = None,
    dtype: Annotated[str | None, _text("--dtype", "TYPE", "auto, float32 or bfloat16.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="YAML file with these options as keys."),
    ] = None,
    mode: Annotated[
        str | None,
        _text("--mode", "MODE", "rows (lines of a text file), paragraphs or document.", TEXTS),
    ] = None,
    format_: Annotated[
        str | None, _text("--format", "KIND", "What FILE is, when its name does not say.", TEXTS)
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--text-field",
            "--text-key",
            metavar="COLUMN",
            help="Column with the text.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    id_field: Annotated[
        str | None, _text("--id-field", "COLUMN", "Column that names each text.", TEXTS)
    ] = None,
    encoding: Annotated[
        str | None, _text("--encoding", "NAME", "What the file is written in: latin-1.", TEXTS)
    ] = None,
    max_words: Annotated[
        int | None,
        typer.Option(metavar="N", help="Keep N words of each text.", rich_help_panel=TEXTS),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Keep N tokens of each text (512).", rich_help_panel=TEXTS),
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Mark texts with fewer as short (16).", rich_help_panel=TEXTS
        ),
    ] = None,
    bos: Annotated[
        str | None, _text("--bos", "WHEN", "Start token before a text: auto, always, never.", TEXTS)
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            "--score",
            metavar="NAME",
            rich_help_panel=SCORES,
            help="loss, ppl, zlib, mink, minkpp, gapk, dcpdd, lowercase, ref, recall, "
            "conrecall, neighbour, pac, or all. May be given again.",
        ),
    ] = None,
    k: Annotated[
        list[float] | None,
        typer.Option(
            "--k",
            metavar="SHARE",
            rich_help_panel=SCORES,
            help="Share of lowest tokens for mink, minkpp, gapk (0.2). May be given again.",
        ),
    ] = None,
    frequencies: Annotated[
        str | None,
        _text("--freq", "FOLDER", "Token frequencies for dcpdd (a rough English one).", SCORES),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            "--ref-model",
            metavar="MODEL",
            rich_help_panel=SCORES,
            help="Second model, for ref.",
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        _text("--prefix", "FILE", "Texts that are no members, for recall.", SCORES),
    ] = None,
    member_prefix: Annotated[
        str | None,
        _text("--member-prefix", "FILE", "Texts that are members, for conrecall.", SCORES),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of the words that pac swaps.", rich_help_panel=SCORES),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of a window (128).", rich_help_panel=WINDOWS),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens between windows (64).", rich_help_panel=WINDOWS),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens read at once (at most 1024).", rich_help_panel=WINDOWS
        ),
    ] = None,
    nonmembers: Annotated[
        str | None,
        _text("--nonmembers", "FILE", "Documents never seen: windows get p-values.", WINDOWS),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="OUT.html", help="Heat map of the document.", rich_help_panel=WINDOWS
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens per forward pass; bounds the memory.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT.jsonl",
            help="Write rows there; the same command goes on when it was stopped.",
        ),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Score texts: higher means the model more likely saw them in training.

    A score ranks texts; alone it decides nothing about any of them. `--json` prints one JSON object
    per text (or window), in the order of the texts. See docs/detection.md.
    """
    given = ctx.params | {"input": file, "format": format_}
    real = getattr(sys.stdout, "real", sys.stdout)
    with listening() as emit:
        printer, summary = _score(given, recipe, html, out, emit, real, offline=offline, json=json)
    printer.end(summary)
    if summary.nothing:
        raise typer.Exit(NOTHING_SCORED)


def _score(
    given: dict[str, Any],
    recipe: Path | None,
    html: Path | None,
    out: Path | None,
    emit: Callable[[dict[str, Any]], None],
    real: TextIO,
    *,
    offline: bool,
    json: bool,
) -> tuple[Any, Any]:
    from unlearn.detect.output import check_absent, part_file
    from unlearn.recipes.detection import Detection, check_early, load_detection, prepare
    from unlearn.recipes.heatmaps import check_html, write_heatmaps

    emit({"event": "stage", "stage": "texts"})
    keys = Detection.model_fields.keys() & given.keys()
    changes = {key: given[key] for key in keys if given[key] not in (None, (), [])}
    detection = load_detection(str(recipe) if recipe else None, changes)
    if out is not None:
        check_absent(out)
    inputs = check_early(detection, _stdin() if detection.input == "-" else None)
    check_html(html, inputs)
    go_offline(offline)
    from unlearn.cli.scores import Printer
    from unlearn.recipes.detection_run import detect

    prepared = prepare(detection, inputs, emit=emit, offline=offline)
    printer = Printer(real, prepared, json=json, silent=out is not None)
    hint = "nothing was kept; with --out FILE the same command goes on where it stopped"
    if out is not None:
        hint = f"the same command goes on; rows so far are in '{part_file(out)}'"
    with explaining_stops(hint):
        summary = detect(prepared, emit=emit, out=out, show=printer.show, keep=html is not None)
    if html is not None:
        write_heatmaps(html, prepared, summary)
    return printer, summary


def _stdin() -> Any:
    return sys.stdin.buffer


app.command(epilog=detect_bench.EPILOG)(detect_bench.bench)
app.command(epilog=detect_audit.EPILOG)(detect_audit.audit)
app.command(epilog=detect_decide.DECIDE)(detect_decide.decide)
app.command(epilog=detect_calibrate.CALIBRATE)(detect_calibrate.calibrate)
app.add_typer(detect_freq.app, name="freq")


def main() -> None:
    """Run the command line."""
    guarded(app)
