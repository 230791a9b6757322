"""``unlearn detect audit``: is the forget set still familiar after unlearning?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.detect_bench import cell
from unlearn.cli.detect_options import (
    SCORES,
    TEXTS,
    BatchTokens,
    Freq,
    MaxTokens,
    Score,
    Seed,
    TextField,
    loaded,
    scored,
    warn,
)
from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening
from unlearn.cli.recipe_option import RecipeFile

EPILOG = (
    "Example: [bold]unlearn detect audit --model models/target --against runs/a/model "
    "--forget people#forget --holdout people#unseen[/bold]"
)


def audit(
    model: Annotated[str, typer.Option(metavar="BEFORE", help="The model before unlearning.")],
    against: Annotated[str, typer.Option(metavar="AFTER", help="The model after unlearning.")],
    forget: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="Texts that were forgotten.", rich_help_panel=TEXTS),
    ],
    holdout: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="Texts of the same kind, never seen.", rich_help_panel=TEXTS
        ),
    ],
    retain_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A model that never saw the forget texts: the aim."),
    ] = None,
    text_field: TextField = None,
    cluster: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="N rows that follow one another, as of one author, are not independent.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    max_tokens: MaxTokens = 512,
    scores: Score = None,
    k: Annotated[
        list[float] | None,
        typer.Option(
            "--k",
            metavar="SHARE",
            help="Shares for mink, minkpp, gapk (0.2 and PrivLeak's 0.4).",
            rich_help_panel=SCORES,
        ),
    ] = None,
    freq: Freq = None,
    seed: Seed = 0,
    batch_tokens: BatchTokens = 8192,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="New folder for the tables.")
    ] = None,
    recipe: RecipeFile = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Compare how familiar forget texts are before and after, against texts never seen.

    An AUC of 1 says that forget texts are told from unseen ones perfectly, 0.5 not at all. After
    unlearning it should be where the retain model's is; below that is a trace as well.
    """
    from unlearn.recipes.inputs import check_model_folder, check_new

    models = {"before": model, "after": against, "retain_model": retain_model}
    for folder in models.values():
        check_model_folder(folder)
    if out is not None:
        check_new(out)
    go_offline(offline)
    from unlearn.detect.settings import Settings
    from unlearn.evals.detection.labelled import clustered, read_sides
    from unlearn.evals.detection.scorer import Extras
    from unlearn.evals.detection.write import write_audit

    extras = Extras(freq)
    settings = Settings(
        k=tuple(k or (0.2, 0.4)), max_tokens=max_tokens, batch_tokens=batch_tokens, seed=seed
    )
    settings = extras.with_scores(settings, scores)
    texts = read_sides(forget, holdout, text_field=text_field, offline=offline)
    texts = clustered(texts, cluster) if cluster else texts
    used = {who: path for who, path in models.items() if path is not None}
    with listening() as emit:
        warn(emit, extras.missing(scores))
        found = _audit(used, texts, settings, extras, emit, offline=offline)
    found |= {"models": used, "data": {"forget": forget, "holdout": holdout}}
    found |= {"settings": {**vars(settings)}}
    if out is not None:
        write_audit(out, found)
        found |= {"out": str(out)}
    say(found, json=json, people=_print_audit)


def _audit(
    models: dict[str, str],
    texts: list[Any],
    settings: Any,
    extras: Any,
    emit: Any,
    *,
    offline: bool,
) -> dict[str, Any]:
    """Score the same texts under one model after the other and compare."""
    from unlearn.detect.blind import blind_baseline
    from unlearn.evals.detection.audit import FORMAT, audit, sides_of, verdict
    from unlearn.evals.detection.bench import clusters_of, ranked

    sizes = sum(text.member for text in texts)
    sides: dict[str, Any] = {}
    notes: list[str] = []
    for who, path in models.items():
        scorer, notes = loaded(emit, path, settings, extras, texts, offline=offline)
        found = scored(emit, texts, scorer, name=who)
        names = ranked(found)
        sides[who] = sides_of([{n: one.scores[n] for n in names} for one in found], sizes)
    compared = audit(
        sides["before"],
        sides["after"],
        sides.get("retain_model"),
        clusters=clusters_of(texts),
        seed=settings.seed,
    )
    blind = blind_baseline(
        [text.text for text in texts[:sizes]], [text.text for text in texts[sizes:]]
    )
    checks = blind.to_dict() | {"warnings": [*blind.warnings, *notes]}
    return {"schema": FORMAT, "scores": compared, "verdict": verdict(compared), "checks": checks}


def _print_audit(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from unlearn.cli.render import PLAIN

    console = Console(highlight=False)
    table = Table(title="AUC of forget texts against unseen ones", **PLAIN)
    table.add_column("")
    for who in found["models"]:
        table.add_column(who.replace("_", " "), justify="right")
    table.add_column("PrivLeak after", justify="right")
    table.add_column("")
    for name, one in found["scores"].items():
        cells = [cell(one["auc"][who]) for who in found["models"]]
        flag = one["flag"].replace("_", " ")
        table.add_row(name, *cells, f"{one['privleak']['after']:+.1f} %", flag)
    console.print(table)
    for text in found["checks"]["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(text)}")
    console.print(found["verdict"][-1], style="dim")
    if found.get("out"):
        console.print(f"[bold]results[/] {escape(found['out'])}", soft_wrap=True)
