"""``unlearn detect calibrate``: a threshold fitted on labelled texts, kept for `decide`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.detect_decide import DECISIONS, Model, conditions, settings
from unlearn.cli.detect_options import (
    BatchTokens,
    Freq,
    LabelField,
    MaxTokens,
    TextField,
    loaded,
    scored,
)
from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening
from unlearn.cli.recipe_option import RecipeFile

CALIBRATE = (
    "Example: [bold]unlearn detect calibrate labelled.jsonl --model models/target --score minkpp "
    "--fpr 0.01 --out calibration.json[/bold]"
)


def calibrate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Texts with labels, as for `bench`.")],
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the threshold is written.")],
    score: Annotated[str, typer.Option(metavar="NAME", help="The score.")] = "minkpp",
    k: Annotated[float, typer.Option(metavar="SHARE", help="Share for mink, minkpp, gapk.")] = 0.2,
    fpr: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="False calls allowed (0.05).", rich_help_panel=DECISIONS),
    ] = None,
    tpr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", help="Members to be found instead.", rich_help_panel=DECISIONS
        ),
    ] = None,
    youden: Annotated[
        bool,
        typer.Option(
            "--youden", metavar="", help="Largest TPR - FPR instead.", rich_help_panel=DECISIONS
        ),
    ] = False,
    text_field: TextField = None,
    label_field: LabelField = None,
    max_tokens: MaxTokens = 512,
    freq: Freq = None,
    batch_tokens: BatchTokens = 8192,
    recipe: RecipeFile = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Fit a threshold on labelled texts and keep it with what it is valid for.

    It holds for this model, tokenizer, start token and number of tokens; `decide` refuses it
    elsewhere.
    """
    from unlearn.errors import UserError
    from unlearn.recipes.inputs import check_model_folder

    check_model_folder(model)
    go_offline(offline)
    if sum((fpr is not None, tpr is not None, youden)) > 1:
        raise UserError("more than one rule was given", "one of --fpr, --tpr and --youden")
    if out.exists():
        raise UserError(f"'{out}' already exists", "choose another --out, or remove it")
    from dataclasses import asdict, replace

    from unlearn.detect import thresholds
    from unlearn.detect.verdict import of_threshold
    from unlearn.evals.detection.bench import checks, sides
    from unlearn.evals.detection.labelled import Columns, read_labelled

    texts = read_labelled(data, columns=Columns(text_field, label_field), offline=offline)
    chosen, extras = settings([score], freq, max_tokens, batch_tokens, 0)
    chosen = replace(chosen, k=(k,))
    with listening() as emit:
        scorer, notes = loaded(emit, model, chosen, extras, texts, offline=offline)
        labelled = scored(emit, texts, scorer)
        doubts = checks(labelled)
    members, others = sides(labelled, score)
    if youden:
        fitted = thresholds.youden(members, others)
    elif tpr is not None:
        fitted = thresholds.at_tpr(members, tpr, nonmembers=others)
    else:
        fitted = thresholds.at_fpr(others, 0.05 if fpr is None else fpr, members=members)
    found = thresholds.Calibration(score, _hyper(chosen), fitted, conditions(scorer))
    thresholds.save(found, out)
    doubts["warnings"] += notes
    told = {"calibration": asdict(found), "words": of_threshold(fitted), "checks": doubts}
    say(told | {"out": str(out)}, json=json, people=_print_threshold)


def _hyper(settings: Any) -> dict[str, Any]:
    """Give what else a score's value depends on."""
    return {"k": settings.k[0], "clip": settings.clip, "gap_window": settings.gap_window}


def _print_threshold(found: dict[str, Any]) -> None:
    print(found["words"])
    for text in found["checks"]["warnings"]:
        print(f"warning: {text}")
    print(f"calibration {found['out']}")
