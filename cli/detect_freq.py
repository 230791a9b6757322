"""``unlearn detect freq``: token frequency tables for DC-PDD, built from a reference corpus."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import Emit, listening
from unlearn.cli.recipe_option import RecipeFile

if TYPE_CHECKING:
    from unlearn.detect.frequency import FrequencyTable

app = typer.Typer(
    help="Token frequencies of a reference corpus, which the score dcpdd needs.",
    no_args_is_help=True,
)
MOST_FREQUENT = 20

Tokenizer = Annotated[
    str, typer.Option("--model", "--tokenizer", help="Folder or hub name with the tokenizer.")
]


@app.command(
    epilog="Example: [bold]unlearn detect freq build corpus.jsonl --model models/target "
    "--out tables/target[/bold]"
)
def build(
    corpus: Annotated[
        str,
        typer.Argument(metavar="CORPUS", help="File, folder, or hub name OWNER/NAME#CONFIG:SPLIT."),
    ],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the table.")],
    text_field: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    mode: Annotated[
        str, typer.Option(help="Text files: rows (one per line), paragraphs or document.")
    ] = "rows",
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens counted of each document; 0 counts all.")
    ] = 1024,
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenise.")] = 1,
    language: Annotated[str, typer.Option(help="A note for readers of the table.")] = "",
    domain: Annotated[str, typer.Option(help="A note for readers of the table.")] = "",
    recipe: RecipeFile = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Count the tokens of CORPUS, which should be like the texts to be judged, and keep the table.

    Memory does not grow with the corpus. A table works with the one tokenizer it was built with.
    """
    from unlearn.errors import unknown
    from unlearn.recipes.inputs import check_model_folder

    if mode not in (modes := ("rows", "paragraphs", "document")):
        raise unknown("mode", mode, modes)
    check_model_folder(tokenizer)
    go_offline(offline)
    from unlearn.detect.corpus import corpus_texts
    from unlearn.detect.frequency import Corpus, build_table, check_new_folder
    from unlearn.models import ModelSource, load_tokenizer

    check_new_folder(out)
    source = ModelSource(tokenizer, offline=offline)
    loaded = load_tokenizer(source)
    with listening(quiet=json) as emit:
        emit({"event": "stage", "stage": "count"})
        table = build_table(
            corpus_texts(corpus, text_field=text_field, mode=mode, offline=offline),  # type: ignore[arg-type]
            loaded,
            corpus=Corpus(corpus, language, domain),
            vocabulary=_vocabulary(source),
            max_tokens=max_tokens or None,
            workers=workers,
            progress=_counted(emit),
        )
    table.save(out)
    say(_described(table, loaded) | {"table": str(out)}, json=json, people=_show_table)


@app.command(epilog="Example: [bold]unlearn detect freq show tables/target[/bold]")
def show(
    table: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A table; 'english' for the rough default.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option("--model", "--tokenizer", help="Check it belongs to this; show its tokens."),
    ] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Say what a table was counted on, how much of the vocabulary it knows, what is frequent."""
    from unlearn.errors import UserError
    from unlearn.recipes.inputs import check_model_folder

    check_model_folder(tokenizer)
    if table == "english" and tokenizer is None:
        raise UserError("the table 'english' is made for a tokenizer", "give --model")
    go_offline(offline)
    from unlearn.detect.english import generic_english
    from unlearn.detect.frequency import load_table
    from unlearn.models import ModelSource, load_tokenizer

    loaded = load_tokenizer(ModelSource(tokenizer, offline=offline)) if tokenizer else None
    found = generic_english(loaded) if table == "english" else load_table(Path(table), loaded)
    say(_described(found, loaded) | {"table": table}, json=json, people=_show_table)


def _vocabulary(source: Any) -> int:
    """Give the size of the model's vocabulary, which may be padded; 0 for a bare tokenizer."""
    from unlearn.kinds import load_config

    try:
        return int(load_config(source).get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError):
        return 0


def _counted(emit: Emit) -> Callable[[int, int], None]:
    def tell(documents: int, tokens: int) -> None:
        what = f"counted {documents:,} documents, {tokens:,} tokens"
        emit({"event": "progress", "what": what, "done": documents, "total": 0})

    return tell


def _described(table: "FrequencyTable", tokenizer: Any) -> dict[str, Any]:
    import numpy as np

    counts, probabilities = np.asarray(table.counts), table.probabilities()
    first = np.argsort(-counts, kind="stable")[:MOST_FREQUENT]
    names = tokenizer.convert_ids_to_tokens(first.tolist()) if tokenizer else [None] * len(first)
    return {
        **vars(table.about),
        "known": int((counts > 0).sum()),
        "nats_per_token": table.own_surprise(),
        "most_frequent": [
            {"id": int(place), "token": name, "share": float(probabilities[place])}
            for place, name in zip(first, names, strict=True)
        ],
    }


def _show_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    counted = f"{found['documents']:,} documents, {found['tokens']:,} tokens"
    if found["generic"]:
        counted = "not counted: made of word ranks; build a table for real work"
    lines = {
        "table": found["table"],
        "corpus": found["corpus"],
        "counted": counted,
        "language": ", ".join(filter(None, (found["language"], found["domain"]))) or "not stated",
        "tokenizer": f"{found['tokenizer']} ({found['tokenizer_sha256'][:12]})",
        "vocabulary": f"{found['known']:,} of {found['vocabulary']:,} tokens occur",
        "surprise": f"{found['nats_per_token']:.2f} nats per token of its own corpus",
    }
    for name, value in lines.items():
        console.print(f"[bold]{name:<11}[/]{escape(str(value))}")
    frequent = (
        f"{one['token'] if one['token'] is not None else one['id']} {100 * one['share']:.2f} %"
        for one in found["most_frequent"]
    )
    console.print(f"[bold]{'frequent':<11}[/]{escape('  '.join(frequent))}")
    if found["most_frequent"][0]["token"] is None:
        console.print("(numbers of tokens; with --model their texts)")
