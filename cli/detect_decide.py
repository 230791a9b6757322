"""``unlearn detect decide``: from scores to calls with known error rates."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn.cli.detect_options import (
    TEXTS,
    BatchTokens,
    Freq,
    MaxTokens,
    Score,
    Seed,
    TextField,
    loaded,
)
from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening
from unlearn.cli.recipe_option import RecipeFile

if TYPE_CHECKING:
    from unlearn.detect.engine import TextScorer
    from unlearn.detect.thresholds import Calibration

DECISIONS = "Decisions"
DECIDE = (
    "Example: [bold]unlearn detect decide suspects.jsonl --model models/target "
    "--nonmembers unseen.jsonl --fpr 0.05[/bold]"
)
FOUND_MEMBERS = 3
"""Exit code with --fail-on-member when a text is called a member."""

Model = Annotated[str, typer.Option(metavar="MODEL", help="Folder or hub name.")]
Fpr = Annotated[
    float,
    typer.Option(metavar="RATE", help="False calls among non-members.", rich_help_panel=DECISIONS),
]


def decide(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="File of texts, or SOURCE#CONFIG:SPLIT.")
    ],
    model: Model,
    nonmembers: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Texts of the same kind that were surely never seen; 200 or more.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    members: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Texts that surely were seen: tells how many of such are found.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A threshold from `calibrate` instead.", rich_help_panel=TEXTS
        ),
    ] = None,
    text_field: TextField = None,
    max_tokens: MaxTokens = 512,
    primary: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE",
            help="The score that decides; choose it before you see numbers (minkpp).",
            rich_help_panel=DECISIONS,
        ),
    ] = None,
    fpr: Fpr = 0.05,
    fdr: Annotated[
        float,
        typer.Option(
            metavar="RATE", help="False calls among all calls.", rich_help_panel=DECISIONS
        ),
    ] = 0.1,
    whole_lengths: Annotated[
        bool,
        typer.Option(
            "--no-match-length",
            metavar="",
            help="Compare with whole references instead of their first tokens.",
            rich_help_panel=DECISIONS,
        ),
    ] = False,
    dataset_test: Annotated[
        bool,
        typer.Option(
            "--dataset-test",
            metavar="",
            help="Also ask whether all texts together were in the training data.",
            rich_help_panel=DECISIONS,
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            metavar="",
            help="Use a threshold that was fitted for something else.",
            rich_help_panel=DECISIONS,
        ),
    ] = False,
    fail_on_member: Annotated[
        bool,
        typer.Option(
            "--fail-on-member",
            metavar="",
            help="Exit with 3 when a text is called a member.",
            rich_help_panel=DECISIONS,
        ),
    ] = False,
    scores: Score = None,
    freq: Freq = None,
    seed: Seed = 0,
    batch_tokens: BatchTokens = 8192,
    recipe: RecipeFile = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Call texts likely members or not, with a known rate of false calls.

    Every text gets a p-value: how many of the non-members (cut to its length) score as high. With
    many texts look at q, which counts false calls among the calls. Exit code 4: too few
    non-members for the rate, or a threshold that was fitted for something else.
    """
    from unlearn.errors import UserError
    from unlearn.recipes.inputs import check_model_folder

    check_model_folder(model)
    go_offline(offline)
    if (nonmembers is None) == (calibration is None):
        raise UserError(
            "a score alone decides nothing",
            "give --nonmembers FILE, or --calibration FILE from `unlearn detect calibrate`",
        )
    texts, others, known = (
        _texts(place, text_field, offline) for place in (source, nonmembers, members)
    )
    fitted = _fitted(calibration)
    chosen, extras = settings(
        [fitted.score] if fitted else scores, freq, max_tokens, batch_tokens, seed, fitted
    )
    if fitted is None:
        from unlearn.detect.judge import check_request

        check_request(chosen, len(others), primary=primary, fpr=fpr, fdr=fdr)
    with listening() as emit:
        scorer, notes = loaded(emit, model, chosen, extras, texts, offline=offline)
        emit({"event": "stage", "stage": "score"})
        if fitted is not None:
            found = _by_threshold(scorer, texts, fitted, str(calibration), force=force)
        else:
            from unlearn.detect.judge import judge, with_dataset_test, with_members

            judged = judge(
                scorer,
                texts,
                [text.text for text in others],
                primary=primary,
                fpr=fpr,
                fdr=fdr,
                match_length=not whole_lengths,
            )
            judged = with_dataset_test(judged) if dataset_test else judged
            judged = with_members(judged, known) if known else judged
            found = {"items": judged.rows(), **judged.summary()}
    found["notes"] = notes
    found |= {"schema": "detect-decide/1", "source": source, "model": model}
    say(found, json=json, people=_print_decisions)
    if fail_on_member and any(item["decision"] == "member" for item in found["items"]):
        raise typer.Exit(FOUND_MEMBERS)


def _texts(place: str | None, text_field: str | None, offline: bool) -> list[Any]:
    from unlearn.detect.text import Text
    from unlearn.evals.detection.labelled import read_texts

    if place is None:
        return []
    found = read_texts(place, text_field=text_field, offline=offline)
    return [Text(number, text) for number, text in enumerate(found)]


def settings(
    scores: list[str] | None,
    freq: str | None,
    max_tokens: int,
    batch_tokens: int,
    seed: int,
    fitted: "Calibration | None" = None,
) -> tuple[Any, Any]:
    """Give the settings of the scores, and what some of them need beside the model."""
    from unlearn.detect.settings import Settings
    from unlearn.evals.detection.scorer import Extras

    extras = Extras(freq)
    hyper = dict(fitted.settings) if fitted else {}
    if "k" in hyper:
        hyper["k"] = (hyper["k"],)
    settings = Settings(max_tokens=max_tokens, batch_tokens=batch_tokens, seed=seed, **hyper)
    return extras.with_scores(settings, scores), extras


def conditions(scorer: "TextScorer") -> Any:
    """Say what a threshold fitted now would be valid for."""
    from unlearn.detect.thresholds import Conditions
    from unlearn.models import tokenizer_sha256, weights_hash

    return Conditions(
        weights_hash(scorer.side.model),
        tokenizer_sha256(scorer.side.tokenizer.tokenizer),
        scorer.settings.bos,
        "snippet",
        scorer.settings.max_tokens,
    )


def _fitted(path: Path | None) -> "Calibration | None":
    from unlearn.detect.thresholds import load

    return load(path) if path else None


def _by_threshold(
    scorer: "TextScorer", texts: list[Any], fitted: "Calibration", source: str, *, force: bool
) -> dict[str, Any]:
    """Judge texts by a threshold that was fitted before."""
    import numpy as np

    from unlearn.detect import thresholds
    from unlearn.detect.verdict import LIMITS, of_threshold

    if not force:
        thresholds.check_conditions(fitted, conditions(scorer), source=source)
    scored = list(scorer(texts))
    values = [one.scores[fitted.score] for one in scored]
    called = thresholds.calls(fitted, {fitted.score: np.array(values, float)})
    names = {True: "member", False: "not_detected"}
    items = [
        one.as_json() | {"decision": None if value is None else names[bool(hit)]}
        for one, value, hit in zip(scored, values, called, strict=True)
    ]
    words = f"{int(called.sum())} of {len(items)} texts are above the threshold."
    return {
        "items": items,
        "primary": fitted.score,
        "called": int(called.sum()),
        "verdict": [words, of_threshold(fitted.threshold)],
        "limits": list(LIMITS),
        "checks": {"warnings": []},
    }


def _print_decisions(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from unlearn.cli.render import PLAIN

    console = Console(highlight=False)
    table = Table(title=f"by {found['primary']}", **PLAIN)
    compared = any("p" in item for item in found["items"])  # a threshold gives no p
    for title in ("id", "tokens", "score", *(("p", "q") if compared else ()), "decision"):
        table.add_column(title, justify="left" if title in ("id", "decision") else "right")
    for item in found["items"]:
        ps = (item["p"].get(found["primary"]), item.get("q")) if compared else ()
        table.add_row(
            escape(str(item["id"])),
            str(item["n_tokens"]),
            _number(item["scores"][found["primary"]]),
            *map(_number, ps),
            (item["decision"] or "no decision").replace("_", " "),
        )
    console.print(table)
    for line in found["verdict"]:
        console.print(escape(line))
    if test := found.get("dataset_test"):
        console.print(
            f"all texts together: p = {test['p']:.3g} (dataset inference, AUC {test['auc']:.2f})"
        )
    for text in (*found["checks"]["warnings"], *found["notes"]):
        console.print(f"[yellow]warning:[/] {escape(text)}")
    console.print(escape(" ".join(found["limits"])), style="dim")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
