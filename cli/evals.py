"""``unlearn eval``: measure a model, look at its answers, read the logs of others."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.eval_math import EPILOG as MATH
from unlearn.cli.eval_math import math
from unlearn.cli.mtp import EVAL as MTP
from unlearn.cli.mtp import measure as mtp
from unlearn.cli.progress import Emit, listening
from unlearn.cli.ranks import require_one_process
from unlearn.cli.tofu import EPILOG, tofu

if TYPE_CHECKING:
    from collections.abc import Callable

    from unlearn.evals.harness.run import Evaluation, Ready
    from unlearn.models import ModelSource

app = typer.Typer(
    help="Measure models: benchmarks, answers side by side, logs of other tools.",
    rich_markup_mode="rich",
    no_args_is_help=True,
)

app.command(epilog=EPILOG)(tofu)
app.command("mtp", epilog=MTP)(mtp)
app.command(epilog=MATH)(math)

GIVEN, HOW = "What is measured", "How it is measured"
START = {"event": "stage", "stage": "reading the data"}


class TruthRatio(StrEnum):
    """How the probabilities of the wrong answers are averaged."""

    geometric = "geometric"
    arithmetic = "arithmetic"


class Dtype(StrEnum):
    """Precision of the weights; auto is bfloat16 on CUDA, float32 elsewhere."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[
    str,
    typer.Option(metavar="MODEL", help="Folder or hub name of the model.", rich_help_panel=GIVEN),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="New folder for results, report and logs.", rich_help_panel=GIVEN
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="First N rows of each task.", rich_help_panel=HOW),
]
BatchSize = Annotated[
    str, typer.Option(metavar="N", help="Rows per batch, or auto.", rich_help_panel=HOW)
]
Precision = Annotated[Dtype, typer.Option(help="Precision of the weights.", rich_help_panel=HOW)]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template",
        metavar="",
        help="Put prompts into the chat template; published numbers do not.",
        rich_help_panel=HOW,
    ),
]


Unlearned = Annotated[
    str, typer.Option(metavar="MODEL", help="The unlearned model.", rich_help_panel=GIVEN)
]
Target = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model before unlearning.", rich_help_panel=GIVEN),
]
RetainModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="A model that never saw the data.", rich_help_panel=GIVEN),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="May be given again.", rich_help_panel=GIVEN),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Questions, with true answers or without: people.jsonl:[:10], lines.txt.",
        rich_help_panel=GIVEN,
    ),
]
AnswerFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="New .md or .json file.", rich_help_panel=GIVEN),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, metavar="N", help="Longest answer.", rich_help_panel=HOW)
]
TemplateText = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=r"'Question: {question}\nAnswer: ' instead of the chat template.",
        rich_help_panel=HOW,
    ),
]
SystemPrompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System turn of every chat.", rich_help_panel=HOW)
]


@app.command(
    epilog="Example: [bold]unlearn eval wmdp --model runs/a/model --data wmdp --limit 100[/bold]"
)
def wmdp(
    model: Model,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Local questions: wmdp-bio.jsonl … mmlu.jsonl. Without it: the hub's.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Some of bio,chem,cyber,mmlu; all by default.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    out: Out = None,
    limit: Limit = None,
    batch_size: BatchSize = "auto",
    chat_template: ChatTemplate = False,
    dtype: Precision = Dtype.auto,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Multiple-choice questions about hazardous knowledge (WMDP), and MMLU for what is kept.

    Accuracy; guessing gives 0.25. The prompts are those of lm-eval's tasks.
    """
    how = {"limit": limit, "batch_size": batch_size, "chat_template": chat_template}

    def find() -> "Ready":
        from unlearn.evals.harness.wmdp import Wmdp

        return Wmdp.find(tasks, data=data, offline=offline)

    with listening() as emit:
        found = _measure(_source(model, offline, dtype), find, how, out, emit)
    _show(found, out, json=json)


@app.command(
    "lm-eval",
    epilog="Example: [bold]unlearn eval lm-eval --model runs/a/model "
    "--tasks hellaswag,truthfulqa_mc2 --limit 200[/bold]",
)
def lm_eval(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Tasks or groups of lm-eval: a,b,c.", rich_help_panel=GIVEN
        ),
    ],
    out: Out = None,
    limit: Limit = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Examples in the prompt; a task's own number by default.",
            rich_help_panel=HOW,
        ),
    ] = None,
    batch_size: BatchSize = "auto",
    chat_template: ChatTemplate = False,
    dtype: Precision = Dtype.auto,
    offline: Offline = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Any task of EleutherAI's lm-evaluation-harness, by name."""
    how = {"limit": limit, "batch_size": batch_size, "chat_template": chat_template}
    how["num_fewshot"] = num_fewshot

    def find() -> "Ready":
        from unlearn.evals.harness.tasks import find_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        return find_tasks(names, offline=offline)

    with listening() as emit:
        found = _measure(_source(model, offline, dtype), find, how, out, emit)
    _show(found, out, json=json)


@app.command(
    epilog="Example: [bold]unlearn eval generate --model runs/a/model --target models/target "
    "--prompt 'Where was Ada born?'[/bold]"
)
def generate(
    model: Unlearned,
    target: Target = None,
    retain_model: RetainModel = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    max_new_tokens: MaxNewTokens = 200,
    template: TemplateText = None,
    system_prompt: SystemPrompt = None,
    out: AnswerFile = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Let the unlearned model, and those it is compared with, answer the same prompts."""
    require_one_process("unlearn eval generate")
    paths = {"target": target, "unlearned": model, "retain_model": retain_model}
    given = {who: path for who, path in paths.items() if path is not None}
    how = {"system_prompt": system_prompt, "max_new_tokens": max_new_tokens}
    how["template"] = template.replace("\\n", "\n") if template is not None else None
    sources = {who: _source(path, offline) for who, path in given.items()}
    with listening() as emit:
        emit(START)
        from unlearn.evals.questions import Questions, ask, writable

        if out is not None:
            writable(out)
        questions = Questions.gather(prompt or [], prompts, offline=offline, **how)
        found = ask({who: source() for who, source in sources.items()}, questions, emit=emit)
    if out is not None:
        _write_answers(out, found)
    from unlearn.cli.eval_tables import print_answers

    say(found, json=json, people=print_answers)


@app.command(
    "import",
    epilog="Example: [bold]unlearn eval import saves/eval/npo/TOFU_EVAL.json "
    "--retain-logs saves/eval/retain90/TOFU_EVAL.json[/bold]",
)
def import_(
    log: Annotated[
        Path,
        typer.Argument(
            metavar="LOG", help="open-unlearning's TOFU_EVAL.json or TOFU's aggregated log (.gz)."
        ),
    ],
    retain_logs: Annotated[
        Path | None,
        typer.Option(metavar="LOG", help="The retain model's log, for forget quality."),
    ] = None,
    truth_ratio: Annotated[
        TruthRatio, typer.Option(help="Mean of the wrong answers' probabilities.")
    ] = TruthRatio.geometric,
    json: Json = False,
) -> None:
    """Forget quality, model utility and every metric from the log of another tool."""
    from unlearn.cli.eval_tables import print_import
    from unlearn.evals.tofu.logs import import_log

    found = import_log(log, retain_logs, truth_ratio=truth_ratio.value)
    say(found, json=json, people=print_import)


def _measure(
    model: "Callable[[], ModelSource]", find: Any, how: dict[str, Any], out: Path | None, emit: Emit
) -> "Evaluation":
    from unlearn.recipes.inputs import check_new

    require_one_process("unlearn eval wmdp or lm-eval")
    if out is not None:
        check_new(out)
    source = model()
    emit(START)
    from unlearn.evals.harness.run import measure
    from unlearn.evals.harness.tasks import HarnessSettings

    settings = HarnessSettings(**how, log_samples=out is not None)
    found = measure(source, find, settings, emit=emit)
    if out is not None:
        found.write(out)
    return found


def _source(path: str, offline: bool, dtype: Dtype = Dtype.auto) -> "Callable[[], ModelSource]":
    """Refuse a model folder that is not there before the slow imports."""
    from unlearn.recipes.inputs import check_model_folder

    check_model_folder(path)
    go_offline(offline)

    def source() -> "ModelSource":
        from unlearn.models import ModelSource

        return ModelSource(path, dtype=dtype.value, offline=offline)

    return source


def _show(found: "Evaluation", out: Path | None, *, json: bool) -> None:
    from unlearn.cli.eval_tables import print_measured

    value = found.to_json() | {"out": str(out) if out else None}
    say(value, json=json, people=print_measured)


def _write_answers(out: Path, found: dict[str, Any]) -> None:
    from unlearn.evals.questions import to_markdown
    from unlearn.runs import write_atomic, write_json

    if out.suffix.lower() == ".json":
        write_json(out, found)
    else:
        write_atomic(out, to_markdown(found))
