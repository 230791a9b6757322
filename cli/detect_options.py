"""What the commands of ``unlearn detect`` that compare texts share: options, loading, progress."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn.cli.progress import Emit

if TYPE_CHECKING:
    from unlearn.detect.engine import TextScorer
    from unlearn.detect.settings import Settings
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


def counting(emit: Emit, size: int) -> Callable[[int], None]:
    """Give a function that is told how many of the texts are done."""

    def tell(done: int) -> None:
        emit({"event": "progress", "what": "texts", "done": done, "total": size})

    return tell
