"""What the commands of ``unlearn detect`` that compare texts share: options, loading, progress."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn.cli.progress import Emit

if TYPE_CHECKING:
    from unlearn.detect.engine import TextScorer
    from unlearn.detect.settings import Settings
    from unlearn.evals.detection.bench import Scored
    from unlearn.evals.detection.labelled import LabelledText
    from unlearn.evals.detection.scorer import Extras

TEXTS, SCORES = "The texts", "The scores"

Score = Annotated[
    list[str] | None,
    typer.Option("--score", metavar="NAME", help="May be given again.", rich_help_panel=SCORES),
]
K = Annotated[
    list[float] | None,
    typer.Option(
        "--k", metavar="SHARE", help="Shares for mink, minkpp, gapk.", rich_help_panel=SCORES
    ),
]
Freq = Annotated[
    str | None,
    typer.Option(
        "--freq",
        metavar="FOLDER",
        help="Frequency table for dcpdd, or 'english' for a rough one.",
        rich_help_panel=SCORES,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference", metavar="MODEL", help="Second model, for ref.", rich_help_panel=SCORES
    ),
]
MaxTokens = Annotated[
    int, typer.Option(min=2, metavar="N", help="Keep N tokens of each text.", rich_help_panel=TEXTS)
]
MaxWords = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Keep N words of each text.", rich_help_panel=TEXTS),
]
TextField = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column with the text.", rich_help_panel=TEXTS)
]
LabelField = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Column with 1 or 0.", rich_help_panel=TEXTS),
]
Seed = Annotated[int, typer.Option(help="Of the resampling.")]
BatchTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens per forward pass.")]


def loaded(
    emit: Emit,
    model: str,
    settings: "Settings",
    extras: "Extras",
    texts: Sequence[Any],
    *,
    offline: bool,
) -> "tuple[TextScorer, list[str]]":
    """Load a model for scoring these texts; also say what is doubtful about the frequency table."""
    from unlearn.evals.detection.scorer import load_scorer
    from unlearn.models import ModelSource

    emit({"event": "stage", "stage": "load"})
    source = ModelSource(model, offline=offline)
    return load_scorer(source, settings, extras, [text.text for text in texts])


def scored(
    emit: Emit, texts: "Sequence[LabelledText]", scorer: "TextScorer", **stage: str
) -> "list[Scored]":
    """Score labelled texts, with progress; what is done outlives a stop."""
    from unlearn.evals.detection.bench import score_labelled
    from unlearn.runs import cache_folder

    def tell(done: int) -> None:
        emit({"event": "progress", "what": "texts", "done": done, "total": len(texts)})

    emit({"event": "stage", "stage": "score", **stage})
    with explaining_stops("the scores so far are kept; the same command goes on"):
        return score_labelled(texts, scorer, folder=cache_folder(), progress=tell)


@contextmanager
def explaining_stops(hint: str) -> Iterator[None]:
    """Say how to go on, when a person stops the work."""
    from unlearn.cli.entry import Halt
    from unlearn.errors import Interrupted

    try:
        yield
    except (Halt, KeyboardInterrupt) as error:
        raise Interrupted("stopped on request", hint) from error


def warn(emit: Emit, messages: Sequence[str]) -> None:
    """Show warnings before the work begins."""
    for message in messages:
        emit({"event": "warning", "message": message})
