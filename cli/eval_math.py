"""``unlearn eval math``: how often a model's own answers to problems are right."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unlearn.cli.detect_options import explaining_stops
from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening
from unlearn.cli.ranks import require_one_process

if TYPE_CHECKING:
    from unlearn.evals.reasoning.endpoint import Endpoint
    from unlearn.evals.reasoning.options import MathOptions
    from unlearn.models import ModelSource

EPILOG = (
    "Example: [bold]unlearn eval math --model runs/a/model --data math500.jsonl --n 4 "
    r"--force-prefix '<think>\n' --out runs/math[/bold]"
)
GIVEN, HOW, SERVER = "What is measured", "How it is measured", "A server that writes"


def _option(help_: str, *names: str, panel: str = HOW, **more: Any) -> Any:
    return typer.Option(*names, help=help_, rich_help_panel=panel, **more)


def math(
    data: Annotated[
        str,
        _option(
            "Rows with problem, question or prompt and answer or solution.",
            panel=GIVEN,
            metavar="SOURCE",
        ),
    ],
    model: Annotated[
        str | None, _option("Folder or hub name of the model.", panel=GIVEN, metavar="MODEL")
    ] = None,
    out: Annotated[
        Path | None,
        _option(
            "Folder for samples, report and results; given again, it goes on.",
            panel=GIVEN,
            metavar="FOLDER",
        ),
    ] = None,
    limit: Annotated[
        int | None, _option("First N problems.", panel=GIVEN, min=1, metavar="N")
    ] = None,
    n: Annotated[int, _option("Samples of each problem.", "--n", min=1, metavar="N")] = 4,
    k: Annotated[str | None, _option("pass@k: 1,4. By default 1 and N.", metavar="K,…")] = None,
    temperature: Annotated[float, _option("0 is greedy, with --n 1.", min=0)] = 0.6,
    top_p: Annotated[float, _option("Share of the probability drawn from.", max=1)] = 0.95,
    max_new_tokens: Annotated[int, _option("Longest completion, in tokens.", min=1)] = 2048,
    force_prefix: Annotated[
        str, _option(r"What every completion begins with: '<think>\n'.", metavar="TEXT")
    ] = "",
    instruction: Annotated[
        str | None,
        _option("Goes with each problem; '' for none. Default: finish in a box.", metavar="TEXT"),
    ] = None,
    template: Annotated[
        str | None,
        _option(r"'Question: {question}\nAnswer:' for the chat template.", metavar="TEXT"),
    ] = None,
    system_prompt: Annotated[
        str | None, _option("System turn of every chat.", metavar="TEXT")
    ] = None,
    verify: Annotated[
        Literal["math", "exact"], _option("math-verify, or equal numbers and texts.")
    ] = "math",
    batch_size: Annotated[int, _option("Completions written at once.", min=1)] = 16,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], _option("Precision of the weights.")
    ] = "auto",
    seed: Annotated[int, _option("Of samples and bootstrap.", min=0)] = 0,
    endpoint: Annotated[
        str | None,
        _option("OpenAI's API: http://HOST:PORT/v1.", panel=SERVER, metavar="URL"),
    ] = None,
    endpoint_model: Annotated[
        str | None, _option("The model's name there.", panel=SERVER, metavar="NAME")
    ] = None,
    concurrency: Annotated[int, _option("Requests at once.", panel=SERVER, min=1)] = 8,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """How often a model's own answers are right: pass@1 over samples, pass@k, lengths.

    Every sample has its own random numbers, so neither batches nor a stop change it. Answers are
    judged by math-verify (the extra `math`). With --endpoint a server writes; its key is
    OPENAI_API_KEY.
    """
    require_one_process("unlearn eval math")
    given: dict[str, Any] = {
        "n": n, "k": _numbers(k), "temperature": temperature, "top_p": top_p,
        "max_new_tokens": max_new_tokens, "force_prefix": force_prefix.replace("\\n", "\n"),
        "template": template.replace("\\n", "\n") if template is not None else None,
        "system_prompt": system_prompt, "verify": verify, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    if instruction is not None:
        given["instruction"] = instruction.replace("\\n", "\n")
    _check(model, endpoint, endpoint_model, offline=offline)
    options = _options(given, out, tokenized=model is not None)
    hint = "the same command goes on" if out else "with --out, the same command would go on"
    with listening() as emit, explaining_stops(hint):
        emit({"event": "stage", "stage": "reading the data"})
        from unlearn.evals.reasoning.run import MathRequest, evaluate_math

        request = MathRequest(
            data,
            _source(model, dtype, offline=offline),
            _endpoint(endpoint, endpoint_model, concurrency),
            options,
            limit,
        )
        found = evaluate_math(request, out=out, emit=emit)
    value = found.to_json() | {"out": str(out) if out else None}
    say(value, json=json, people=print_math)


def print_math(found: dict[str, Any]) -> None:
    """Print pass@k with both kinds of doubt, lengths, and what is to be known."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from unlearn.cli.render import PLAIN, shortened

    console = Console()
    settings, details = found["settings"], found["details"]
    asked = f"{settings['problems']} problems × {settings['n']}"
    table = Table(title=f"{escape(shortened(found['model']))}: {asked}", **PLAIN)
    table.add_column("")
    for title in ("value", "± over samples", "95 % over problems"):
        table.add_column(title, justify="right", no_wrap=True)
    error = details.get("math_sampling_error", {}).get("value")
    for name, metric in details.items():
        if name == "math_sampling_error":
            continue
        around = f"{error:.4f}" if name == "math_pass_at_1" and error is not None else ""
        digits = 1 if name == "math_tokens" else 4
        between = f"{metric['low']:.{digits}f} – {metric['high']:.{digits}f}"
        table.add_row(_title(name), f"{metric['value']:.{digits}f}", around, between)
    console.print(table)
    for note in settings["notes"]:
        console.print(f"note: {escape(note)}", style="yellow", highlight=False)
    if found.get("out"):
        console.print(f"[bold]results[/] {escape(found['out'])}", highlight=False, soft_wrap=True)


def _title(name: str) -> str:
    words = {"math_tokens": "tokens, mean", "math_truncated": "cut before the end"}
    return words.get(name, name.replace("math_pass_at_", "pass@"))


def _numbers(text: str | None) -> tuple[int, ...] | None:
    from unlearn.errors import UserError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"cannot read --k {text}", "give numbers: --k 1,4,16") from error


def _check(
    model: str | None,
    endpoint: str | None,
    endpoint_model: str | None,
    *,
    offline: bool,
) -> None:
    """Refuse what is wrong at first sight, before the slow imports."""
    from unlearn.errors import UserError
    from unlearn.evals.reasoning.options import check_writer
    from unlearn.recipes.inputs import check_model_folder

    if (endpoint is None) != (endpoint_model is None):
        missing = "--endpoint-model NAME" if endpoint else "--endpoint URL"
        raise UserError("one of --endpoint and --endpoint-model is missing", f"give {missing}")
    check_writer(model=model is not None, endpoint=endpoint is not None, offline=offline)
    if model is not None:
        check_model_folder(model)
    go_offline(offline)


def _options(given: dict[str, Any], out: Path | None, *, tokenized: bool) -> "MathOptions":
    """Give the checked settings; what the options alone decide is refused without torch."""
    from unlearn.evals.reasoning.completions import check_folder
    from unlearn.evals.reasoning.options import MathOptions
    from unlearn.evals.reasoning.verify import check_judge

    options = MathOptions(**given)
    options.check()
    if not tokenized:
        options.check_untokenized()
    check_judge(options.verify)
    if out is not None:
        check_folder(out, options.decisive())
    return options


def _source(model: str | None, dtype: Any, *, offline: bool) -> "ModelSource | None":
    from unlearn.models import ModelSource

    return ModelSource(model, dtype=dtype, offline=offline) if model is not None else None


def _endpoint(url: str | None, name: str | None, concurrency: int) -> "Endpoint | None":
    from unlearn.evals.reasoning.endpoint import Endpoint

    if url is None or name is None:
        return None
    key = os.environ.get("OPENAI_API_KEY") or None
    return Endpoint(url, name, api_key=key, concurrency=concurrency)
