"""``unlearn data pairs`` and ``unlearn data ladder``: pairs of answers to post-train on."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening

PAIRS = (
    "Example: [bold]unlearn data pairs traces.jsonl --verdict 'llama & math_verify' "
    "--out data/math[/bold]"
)
LADDER = (
    "Example: [bold]unlearn data ladder prompts.jsonl --chosen-model models/3b "
    "--rejected-model models/1.5b --out data/delta[/bold]"
)
Traces = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="Rows with a problem and several answers to it."),
]
Folder = Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the files.")]
Where = Annotated[
    list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="May be given again.")
]


def pairs(
    source: Traces,
    verdict: Annotated[
        str,
        typer.Option(
            metavar="EXPRESSION",
            help="Columns of verdicts, one per answer, joined with &, | and ~.",
        ),
    ],
    out: Folder,
    generations: Annotated[str, typer.Option(help="Column with the answers.")] = "generations",
    negative: Annotated[
        Literal["not_positive", "all_false"],
        typer.Option(help="Wrong is what is not right, or only what every verdict denies."),
    ] = "not_positive",
    per_problem: Annotated[
        str, typer.Option(metavar="N|all", help="Pairs made of one problem.")
    ] = "1",
    keep: Where = None,
    drop: Where = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Evaluation questions: problems like them are out."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to be trained, whose tokens are counted.")
    ] = None,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="Longest problem, tokens.")] = None,
    max_response: Annotated[int | None, typer.Option(min=1, help="Longest answer, tokens.")] = None,
    unterminated: Annotated[
        bool, typer.Option("--keep-unterminated", help="Keep answers that never stop thinking.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Make pairs of right and wrong answers out of traces whose verdicts are known.

    Writes pairs.jsonl, first.jsonl (right answers to train on first) and made.json (how, counts).
    """
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "pairs"})
        from unlearn.data.traces import How
        from unlearn.data.verdicts import Verdict
        from unlearn.models import ModelSource
        from unlearn.recipes.pair_data import write_pairs

        how = How(
            Verdict.parse(verdict),
            generations=generations,
            negative=negative,
            per_problem=_number(per_problem),
            keep=_conditions(keep, "--keep"),
            drop=_conditions(drop, "--drop"),
            unterminated=unterminated,
            max_prompt=max_prompt,
            max_response=max_response,
            seed=seed,
        )
        tokenizer = ModelSource(model, offline=offline) if model else None
        found = write_pairs(
            source, out, how, against=against or [], tokenizer=tokenizer, offline=offline
        )
    say(found, json=json, people=_print)


def ladder(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Rows with a question.")],
    chosen_model: Annotated[str, typer.Option(help="The larger model of a family.")],
    rejected_model: Annotated[str, typer.Option(help="The smaller one.")],
    out: Folder,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 2048,
    max_rows: Annotated[int | None, typer.Option(min=1, help="First questions only.")] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Make pairs of the answers of a larger and a smaller model, without any verdict.

    Stopped, it goes on where it was when it is given again.
    """
    from unlearn.data.ladder import check_different
    from unlearn.recipes.inputs import check_model_folder

    for model in (chosen_model, rejected_model):
        check_model_folder(model)
    check_different(chosen_model, rejected_model)
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "pairs"})
        from unlearn.models import ModelSource
        from unlearn.recipes.pair_data import write_ladder

        found = write_ladder(
            source,
            out,
            chosen=ModelSource(chosen_model, offline=offline),
            rejected=ModelSource(rejected_model, offline=offline),
            max_new_tokens=max_new_tokens,
            max_rows=max_rows,
            progress=lambda what, done, total: emit(
                {"event": "progress", "what": what, "done": done, "total": total}
            ),
        )
    say(found, json=json, people=_print)


def _number(text: str) -> int | None:
    from unlearn.errors import UserError

    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--per-problem {text} given", "give a number of 1 or more, or all")
    return int(text)


def _conditions(given: list[str] | None, flag: str) -> dict[str, str]:
    from unlearn.errors import UserError

    found = {}
    for text in given or []:
        name, mark, value = text.partition("=")
        if not (name and mark and value):
            raise UserError(f"cannot read {flag} {text}", "write COLUMN=VALUE, e.g. source=cn_k12")
        found[name] = value
    return found


def _print(found: dict[str, Any]) -> None:
    for what, number in found["counts"].items():
        print(f"{number:>9,}  {what}")
    print(f"{found['out']}/pairs.jsonl")
