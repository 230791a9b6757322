"""``unlearn data``: look at the tokens a run would train on; write other answers to its rows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, say
from unlearn.cli.progress import listening

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, RenderableType
    from rich.text import Text

app = typer.Typer(
    help="Look at data before training on it, or add other answers to it.", no_args_is_help=True
)

TRAINED = (
    "bold #10281a on #8fdc9a",
    "bold #10281a on #b9efc0",
)  # two greens: neighbours stay apart
PROMPT = "dim"
MARKS = ("⟦", "⟧")  # around trained tokens where there is no colour

Source = Annotated[
    str, typer.Argument(help="FILE, FOLDER#CONFIG:SPLIT or a hub name; slices as train[:100].")
]
Tokenizer = Annotated[
    str, typer.Option("--model", "--tokenizer", help="Folder or hub name with the tokenizer.")
]
TemplateText = Annotated[
    str | None,
    typer.Option(help=r"'Question: {question}\nAnswer: ' instead of the chat template."),
]
SystemPrompt = Annotated[str | None, typer.Option(help="System turn of every chat.")]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="NAME=COLUMN", help="Read NAME from COLUMN: question=q."),
]
Rows = Annotated[int, typer.Option(min=0, help="How many rows to show in full.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens per row; the rest is cut off.")]


@app.command()
def preview(
    source: Source,
    tokenizer: Tokenizer,
    template: TemplateText = None,
    system_prompt: SystemPrompt = None,
    map_: Map = None,
    rows: Rows = 3,
    max_length: MaxLength = 512,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Show which tokens of SOURCE would be trained; refuse it where the labels make no sense."""
    columns = columns_of(map_ or [])
    go_offline(offline)
    from unlearn.data import Template, encode, load_rows, row_kind
    from unlearn.data import preview as describe
    from unlearn.models import ModelSource, load_tokenizer

    loaded = load_rows(source, columns=columns, offline=offline)
    words = load_tokenizer(ModelSource(tokenizer, offline=offline))
    text = template.replace("\\n", "\n") if template is not None else None
    chosen = Template.for_tokenizer(words, text, system_prompt, {})
    examples = encode(loaded, words, chosen, max_length=max_length, source=source)
    result = _as_json(describe(examples, words, rows)) | {
        "source": source,
        "kind": row_kind(loaded[0]),
        "max_length": max_length,
        "template": chosen.fingerprint(),
        "notes": _notes(chosen),
    }
    say(result, json=json, people=_print)


@app.command(
    epilog="Example: [bold]unlearn data alternates forget.jsonl --model models/target "
    "--out forget-alternates.jsonl[/bold]"
)
def alternates(
    source: Source,
    model: Annotated[str, typer.Option(help="The model that is to forget: it writes them itself.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="New .jsonl file.")],
    samples: Annotated[int, typer.Option(min=1, help="Alternates per row.")] = 5,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest alternate, in tokens.")] = 200,
    template: TemplateText = None,
    map_: Map = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Write SOURCE again with other plausible answers to each row, for the method altpo.

    Stopped, it keeps the finished rows; the same command goes on from there.
    """
    from unlearn.recipes.inputs import check_model_folder

    columns = columns_of(map_ or [])
    check_model_folder(model)
    go_offline(offline)
    with listening() as emit:
        emit({"event": "stage", "stage": "alternates"})
        from unlearn.models import ModelSource
        from unlearn.recipes.alternates import Request, write_alternates

        found = write_alternates(
            source,
            ModelSource(model, offline=offline),
            out,
            request=Request(samples, temperature, seed, max_new_tokens),
            columns=columns,
            template=template.replace("\\n", "\n") if template is not None else None,
            progress=lambda done, total: emit(
                {"event": "progress", "what": "rows", "done": done, "total": total}
            ),
        )
    say(found, json=json, people=_print_alternates)


def _print_alternates(found: dict[str, Any]) -> None:
    print(
        f"{found['out']}: {found['alternates']:,} alternates for {found['rows']:,} rows; "
        f"{found['retried']:,} samples drawn again, {found['dropped']:,} given up"
    )
    if without := found["rows_without"]:
        numbers = ", ".join(map(str, without[:5])) + (", …" if len(without) > 5 else "")
        print(f"{len(without):,} of them have none (row {numbers}): write some, or remove them")


def columns_of(pairs: list[str]) -> dict[str, str]:
    """Read ``--map NAME=COLUMN`` texts."""
    from unlearn.errors import UserError

    columns = {}
    for pair in pairs:
        name, mark, column = pair.partition("=")
        if not (name and mark and column):
            raise UserError(f"cannot read --map {pair}", "write NAME=COLUMN, e.g. question=q")
        columns[name] = column
    return columns


def _notes(template: Any) -> list[str]:
    if not template.writes_todays_date:
        return []
    return [
        "the chat template writes today's date into every prompt; set "
        "data.template_args.date_string in the recipe to get the same tokens tomorrow"
    ]


def _as_json(described: Any) -> dict[str, Any]:
    shortest, middle, longest = described.lengths
    return {
        "rows": described.num_rows,
        "examples": described.num_examples,
        "tokens": described.num_tokens,
        "trained_tokens": described.num_labelled,
        "share_trained": described.share_labelled,
        "lengths": {"min": shortest, "median": middle, "max": longest},
        "truncated": described.num_truncated,
        "preview": [
            {
                "row": one.row + 1,
                "cut": one.cut,
                "tokens": [token.text for token in one.tokens],
                "trained": [token.labelled for token in one.tokens],
            }
            for one in described.rows
        ],
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    for part in render(result, console):
        console.print(part)


def render(result: dict[str, Any], console: "Console") -> "Iterable[RenderableType]":
    """Draw what ``preview --json`` prints: one panel per row, then the counts."""
    coloured = console.color_system is not None and not console.no_color
    for row in result["preview"]:
        yield _panel(row, coloured=coloured)
    yield _summary(result, coloured=coloured)


def _panel(row: dict[str, Any], *, coloured: bool) -> "RenderableType":
    from rich.panel import Panel

    title = (
        f"[bold]row {row['row']}[/] · {len(row['tokens'])} tokens · {sum(row['trained'])} trained"
    )
    cut = f"{row['cut']} more tokens cut off by --max-length" if row["cut"] else None
    return Panel(
        _tokens(row["tokens"], row["trained"], coloured=coloured),
        title=title,
        title_align="left",
        subtitle=f"[yellow]{cut}[/]" if cut else None,
        subtitle_align="right",
        border_style="dim",
        padding=(0, 1),
    )


def _tokens(tokens: list[str], trained: list[bool], *, coloured: bool) -> "Text":
    from rich.text import Text

    text = Text()
    before = False
    shade = 0
    for token, labelled in zip(tokens, trained, strict=True):
        if labelled != before and not coloured:
            text.append(MARKS[0] if labelled else MARKS[1])
        text.append(_visible(token), TRAINED[shade] if labelled else PROMPT)
        shade = 1 - shade
        before = labelled
    if before and not coloured:
        text.append(MARKS[1])
    return text


def _visible(token: str) -> str:
    """Show line breaks, and control characters that would otherwise reach the terminal."""
    shown = []
    for character in token:
        if character == "\n":
            shown.append("⏎\n")
        elif character.isprintable():
            shown.append(character)
        else:
            shown.append(chr(0x2400 + ord(character)) if ord(character) < 32 else "\N{MIDDLE DOT}")
    return "".join(shown)


def _summary(result: dict[str, Any], *, coloured: bool) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    rows = f"{result['rows']:,} {'row' if result['rows'] == 1 else 'rows'}"
    if result["examples"] != result["rows"]:
        rows += f" in {result['examples']:,} windows"
    counts = Text.assemble((rows, "bold"), f" · {result['tokens']:,} tokens · ")
    share = f"{result['trained_tokens']:,} trained ({result['share_trained']:.1%})"
    counts.append(f" {share} " if coloured else share, TRAINED[0] if coloured else "")
    lengths = "lengths: min {min}, median {median:g}, max {max} tokens · ".format(
        **result["lengths"]
    )
    truncated = f"{result['truncated']:,} truncated at {result['max_length']}"
    limits = Text.assemble(lengths, (truncated, "bold yellow" if result["truncated"] else ""))
    return Group(counts, limits, *(Text(f"note: {note}", "yellow") for note in result["notes"]))
