"""``unlearn detect bench``: how well scores do on texts whose membership is known."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.detect_options import (
    TEXTS,
    BatchTokens,
    Freq,
    K,
    LabelField,
    MaxTokens,
    MaxWords,
    Reference,
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
    "Example: [bold]unlearn detect bench --data wikimia:64 --model EleutherAI/pythia-2.8b "
    "--out bench/wikimia[/bold]"
)


def bench(
    model: Annotated[str, typer.Option(metavar="MODEL", help="Folder or hub name.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="wikimia[:64], bookmia, patentmia, mimir:github, muse:news, or a labelled FILE.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="PATH", help="A copy of DATA on this machine.", rich_help_panel=TEXTS
        ),
    ] = None,
    members: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Texts that were seen, instead of --data.", rich_help_panel=TEXTS
        ),
    ] = None,
    nonmembers: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Texts that were not seen.", rich_help_panel=TEXTS),
    ] = None,
    text_field: TextField = None,
    label_field: LabelField = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN|N",
            help="Texts with the same value (book_id), or N in a row, are not independent.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    max_words: MaxWords = None,
    max_tokens: MaxTokens = 512,
    year: Annotated[
        int | None,
        typer.Option(
            help="The model's; warns of texts that name a later one.", rich_help_panel=TEXTS
        ),
    ] = None,
    scores: Score = None,
    k: K = None,
    freq: Freq = None,
    reference: Reference = None,
    seed: Seed = 0,
    batch_tokens: BatchTokens = 8192,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="New folder for tables and ROC plot.")
    ] = None,
    recipe: RecipeFile = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Compare scores on texts of known membership: AUC, TPR at 5 % and 1 % FPR, FPR at 95 % TPR.

    With 95 % intervals, per length, and with a warning when the two kinds of texts can be told
    apart without the model: then the figures may show that, and nothing about membership.
    """
    from unlearn.recipes.inputs import check_model_folder, check_new

    for folder in (model, reference):
        check_model_folder(folder)
    if out is not None:
        check_new(out)
    go_offline(offline)
    from unlearn.detect.settings import Settings
    from unlearn.evals.detection.bench import measure
    from unlearn.evals.detection.scorer import Extras
    from unlearn.evals.detection.write import write_bench

    extras = Extras(freq, reference)
    settings = Settings(
        k=tuple(k or (0.2,)), max_tokens=max_tokens, batch_tokens=batch_tokens, seed=seed
    )
    settings = extras.with_scores(settings, scores)
    columns = (text_field, label_field, cluster)
    texts = _read(data, path, members, nonmembers, columns, max_words, offline)
    with listening() as emit:
        warn(emit, extras.missing(scores))
        scorer, notes = loaded(emit, model, settings, extras, texts, offline=offline)
        found = scored(emit, texts, scorer)
        emit({"event": "stage", "stage": "benchmark"})
        result = measure(found, seed=seed, year=year)
    result["checks"]["warnings"] += notes
    shown = data or f"{members} against {nonmembers}"
    result |= {"data": shown, "model": model, "settings": _plain(settings, max_words)}
    if out is not None:
        write_bench(out, result, found)
        result |= {"out": str(out)}
    say(result, json=json, people=print_bench)


def _read(
    data: str | None,
    path: str | None,
    members: str | None,
    nonmembers: str | None,
    columns: tuple[str | None, str | None, str | None],
    max_words: int | None,
    offline: bool,
) -> list[Any]:
    from dataclasses import replace

    from unlearn.errors import UserError
    from unlearn.evals.detection.labelled import Columns, clustered, read_labelled, read_sides

    text_field, label_field, cluster = columns
    rows = int(cluster) if cluster and cluster.isdigit() else 0
    if (data is None) == (members is None and nonmembers is None):
        raise UserError(
            "give the texts once", "--data DATA, or --members SOURCE with --nonmembers SOURCE"
        )
    if data is not None:
        names = Columns(text_field, label_field, None if rows else cluster)
        texts = read_labelled(data, path=path, columns=names, offline=offline)
    elif members is None or nonmembers is None:
        raise UserError("only one side was given", "give --members and --nonmembers")
    elif cluster and not rows:
        raise UserError(f"no number of rows: '{cluster}'", "--cluster N with --members, as 20")
    else:
        texts = read_sides(members, nonmembers, text_field=text_field, offline=offline)
    texts = clustered(texts, rows) if rows else texts
    if max_words is None:
        return texts
    return [replace(text, text=" ".join(text.text.split()[:max_words])) for text in texts]


def _plain(settings: Any, max_words: int | None) -> dict[str, Any]:
    return {**vars(settings), "max_words": max_words}


def print_bench(found: dict[str, Any]) -> None:
    """Print the figures of every score, the groups, and what makes them doubtful."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from unlearn.cli.render import PLAIN, shortened

    console = Console(highlight=False)
    sizes = f"{found['members']} members, {found['nonmembers']} non-members"
    table = Table(title=f"{escape(shortened(found['data']))}: {sizes}", **PLAIN)
    table.add_column("")
    titles = ("AUC", "TPR @ 5 % FPR", "TPR @ 1 % FPR", "FPR @ 95 % TPR")
    for title in titles:
        table.add_column(title, justify="right")
    for name, one in found["metrics"].items():
        keys = ("auc", "tpr@5%fpr", "tpr@1%fpr", "fpr@95%tpr")
        table.add_row(name, *(cell(one[key] if one else {}) for key in keys))
    console.print(table)
    _print_groups(console, found)
    for status, count in found["left_out"].items():
        console.print(f"{count} texts have no score ({status})", style="yellow")
    if found["checks"]["blind_auc"] is not None:
        console.print(
            f"without the model, from words alone: AUC {found['checks']['blind_auc']:.3f}"
        )
    for text in found["checks"]["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(text)}")
    if found.get("out"):
        console.print(f"[bold]results[/] {escape(found['out'])}", soft_wrap=True)


def _print_groups(console: Any, found: dict[str, Any]) -> None:
    from rich.table import Table

    from unlearn.cli.render import PLAIN

    if len(found["groups"]) < 2:
        return
    table = Table(title="AUC by length or part", **PLAIN)
    for title in ("", "texts", *found["metrics"]):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for group in found["groups"]:
        metrics = group["metrics"] or {}
        cells = [
            f"{metrics[name]['auc']['value']:.3f}" if metrics.get(name) else "–"
            for name in found["metrics"]
        ]
        sizes = f"{group['members']} + {group['nonmembers']}"
        table.add_row(group["group"], sizes, *cells)
    console.print(table)


def cell(one: dict[str, Any]) -> str:
    """Write a figure over its interval; a dash where there is none."""
    if one.get("value") is None:
        return "–"
    return f"{one['value']:.3f}\n[dim]{one['low']:.3f}–{one['high']:.3f}[/]"
