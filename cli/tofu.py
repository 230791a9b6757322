"""``unlearn eval tofu``: what a model still knows of TOFU's authors, beside a retain model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening
from unlearn.cli.ranks import joined_ranks

if TYPE_CHECKING:
    from unlearn.evals.report.table import Cell, Row

GIVEN, HOW = "What is evaluated", "How it is evaluated"
ARROWS = {"lower": "↓", "higher": "↑", "none": ""}
EPILOG = (
    "Example: [bold]unlearn eval tofu --model models/unlearned --retain-model models/retain90 "
    "--split forget10 --out evals/unlearned[/bold]"
)

Model = Annotated[
    str,
    typer.Option(metavar="MODEL", help="Folder or hub name.", rich_help_panel=GIVEN),
]
Split = Annotated[str, typer.Option(help="forget01, forget05 or forget10.", rich_help_panel=GIVEN)]
RetainModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Model that never saw the forget set; evaluated too.",
        rich_help_panel=GIVEN,
    ),
]
RetainLogs = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Its stored evaluation instead (TOFU_EVAL.json, plain or .gz).",
        rich_help_panel=GIVEN,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="SOURCE", help="Folder or hub name with TOFU's sets.", rich_help_panel=GIVEN
    ),
]
Holdout = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Rows no model saw, for membership inference; by default the data's holdoutXX.",
        rich_help_panel=GIVEN,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="New folder for report, records and logs.", rich_help_panel=GIVEN
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help=r"'Question: {question}\nAnswer: ' instead of the chat template.",
        rich_help_panel=HOW,
    ),
]
SystemPrompt = Annotated[
    str | None, typer.Option(help="System turn of every chat.", rich_help_panel=HOW)
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Argument of the chat template, as date_string; may be given again.",
        rich_help_panel=HOW,
    ),
]
TruthRatio = Annotated[
    str, typer.Option(help="geometric, arithmetic or prob_mean.", rich_help_panel=HOW)
]
Es = Annotated[
    str | None,
    typer.Option(help="Extraction strength: exact (default), ou or satimp.", rich_help_panel=HOW),
]
Compat = Annotated[
    str,
    typer.Option(
        metavar="none|ou",
        help="ou: open-unlearning's numbers, its quirks included.",
        rich_help_panel=HOW,
    ),
]
Probes = Annotated[
    bool,
    typer.Option(
        "--probes",
        metavar="",
        help="Also ask paraphrased questions and with a jailbreak lead-in (takes twice as long).",
        rich_help_panel=HOW,
    ),
]
Gradnorm = Annotated[
    bool,
    typer.Option(
        "--gradnorm",
        metavar="",
        help="Also attack by gradient norm (a backward pass per row).",
        rich_help_panel=HOW,
    ),
]
NoGenerate = Annotated[
    bool,
    typer.Option(
        "--no-generate",
        metavar="",
        help="Let the model write nothing: no ROUGE, no model utility.",
        rich_help_panel=HOW,
    ),
]
MaxRows = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="First rows of each set only; by default all. TOFU's own script takes 300.",
        rich_help_panel=HOW,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=HOW)
]
BatchTokens = Annotated[
    int, typer.Option(min=1, help="Tokens per batch: lower it for memory.", rich_help_panel=HOW)
]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.", rich_help_panel=HOW)]
Seed = Annotated[int, typer.Option(min=0, help="Of the bootstrap.", rich_help_panel=HOW)]


def tofu(
    model: Model,
    split: Split = "forget10",
    retain_model: RetainModel = None,
    retain_logs: RetainLogs = None,
    data: Data = "locuslab/TOFU",
    holdout: Holdout = None,
    out: Out = None,
    template: Template = None,
    system_prompt: SystemPrompt = None,
    template_arg: TemplateArg = None,
    truth_ratio: TruthRatio = "geometric",
    es: Es = None,
    compat: Compat = "none",
    probes: Probes = False,
    gradnorm: Gradnorm = False,
    no_generate: NoGenerate = False,
    max_rows: MaxRows = None,
    max_new_tokens: MaxNewTokens = 200,
    batch_tokens: BatchTokens = 8192,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Measure what a model knows of TOFU's authors; compare it with a retain model."""
    from unlearn.recipes.inputs import check_new

    _check_choices(truth_ratio=truth_ratio, es=es, compat=compat, dtype=dtype)
    options = {
        "split": split,
        "data": data,
        "holdout": holdout,
        "template": template.replace("\\n", "\n") if template is not None else None,
        "system_prompt": system_prompt,
        "template_args": _pairs(template_arg or []),
        "truth_ratio": truth_ratio,
        "es": es,
        "compat": compat,
        "probes": probes,
        "gradnorm": gradnorm,
        "generate": not no_generate,
        "max_rows": max_rows,
        "max_new_tokens": max_new_tokens,
        "batch_tokens": batch_tokens,
        "seed": seed,
    }
    _check_files(model, retain_model, retain_logs, data)
    if out is not None:
        check_new(out)
    go_offline(offline)
    with joined_ranks() as first, listening(quiet=not first) as emit:
        emit({"event": "stage", "stage": "reading the data"})
        from unlearn.evals.tofu.benchmark import TofuOptions
        from unlearn.evals.tofu.run import TofuRequest, measure_tofu
        from unlearn.models import ModelSource

        source = ModelSource(model, dtype=dtype, offline=offline)  # type: ignore[arg-type]
        request = TofuRequest(source, TofuOptions(**options), retain_model, retain_logs)  # type: ignore[arg-type]
        evaluation = measure_tofu(request, out=out, emit=emit)
        if out is not None and first:
            evaluation.write(out)
    if not first:
        return
    if json:
        say(evaluation.to_json(), json=True, people=print)
    else:
        print_tofu(evaluation.to_results(out))


def print_tofu(results: dict[str, Any]) -> None:
    """Print every metric in blocks, the retain model's beside it, and what is to be known."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print()
    console.print(_table(results))
    console.print("[dim]↓ lower, ↑ higher is wanted; 95 % bootstrap intervals over rows[/]")
    for text in results["warnings"]:
        console.print(f"[yellow]note:[/] {escape(text)}", highlight=False)
    if results["report"]:
        console.print(f"[bold]report[/] {escape(results['report'])}", highlight=False)


def _table(results: dict[str, Any]) -> Any:
    from rich.table import Table

    from unlearn.cli.render import PLAIN
    from unlearn.evals.report.table import blocks, table

    rows = table(results)
    compared = any(row.retain_model for row in rows)
    drawn = Table(title=f"TOFU {results['settings']['split']}: {results['model']}", **PLAIN)
    drawn.add_column("")
    for name in ("model", "95 % interval", ""):
        drawn.add_column(name, justify="right", no_wrap=True)
    if compared:
        drawn.add_column("retain model", justify="right", no_wrap=True)
    for title, chosen in blocks(rows).items():
        drawn.add_row(f"[bold]{title}[/]")
        for row in chosen:
            drawn.add_row(*_cells(row, compared=compared))
        drawn.add_section()
    return drawn


def _cells(row: "Row", *, compared: bool) -> list[str]:
    cell = row.after
    between = ""
    if cell is not None and cell.low is not None and cell.high is not None:
        between = f"[dim]{_number(cell.low)} – {_number(cell.high)}[/]"
    shown = [f"  {row.title}", _value(cell), between, ARROWS[row.direction]]
    return [*shown, _value(row.retain_model)] if compared else shown


def _value(cell: "Cell | None") -> str:
    return "–" if cell is None or cell.value is None else _number(cell.value)


def _number(value: float) -> str:
    from unlearn.evals.report.table import number

    return number(value)


def _check_choices(**given: str | None) -> None:
    """Refuse a word that is none of an option's choices."""
    from unlearn.errors import unknown

    allowed = {
        "truth_ratio": ("geometric", "arithmetic", "prob_mean"),
        "es": ("exact", "ou", "satimp"),
        "compat": ("none", "ou"),
        "dtype": ("auto", "float32", "bfloat16"),
    }
    for name, value in given.items():
        if value is not None and value not in allowed[name]:
            raise unknown(f"--{name.replace('_', '-')}", value, allowed[name])


def _check_files(model: str, retain_model: str | None, retain_logs: Path | None, data: str) -> None:
    """Refuse paths that are not there before the slow imports."""
    from unlearn.errors import UserError
    from unlearn.recipes.inputs import check_model_folder, is_path

    for path in (model, retain_model):
        check_model_folder(path)
    if retain_logs is not None and not retain_logs.is_file():
        raise UserError(f"no file '{retain_logs}'", "give the retain model's TOFU_EVAL.json")
    if is_path(data) and not Path(data).exists():
        raise UserError(f"no data folder '{data}'", "give a folder or a hub name owner/name")


def _pairs(texts: list[str]) -> dict[str, str]:
    from unlearn.errors import UserError

    found = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not (name and mark):
            raise UserError(f"cannot read --template-arg {text}", "write NAME=VALUE")
        found[name] = value
    return found
