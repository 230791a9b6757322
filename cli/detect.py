"""The ``detect-pretraining`` command: how familiar is each line of a file to a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, guarded, say

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(
    epilog="Example: [bold]detect-pretraining passages.txt --model models/target --json[/bold]"
)
def detect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Text file, one text per line.")],
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Folder or hub name of a causal language model."),
    ],
    k: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, metavar="SHARE", help="Share of least likely tokens for Min-K%."
        ),
    ] = 0.2,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Score each line of FILE: higher means the model more likely saw it in training.

    Scores are loss, zlib and Min-K%. They rank texts; alone they prove nothing about one text.
    """
    from unlearn.recipes.inputs import check_model_folder

    texts = _lines(file)
    check_model_folder(model)
    go_offline(offline)
    from unlearn.detect.run import score_texts

    rows = score_texts(model, list(texts.values()), k=k, offline=offline)
    rows = [row | {"line": line} for line, row in zip(texts, rows, strict=True)]
    say({"file": str(file), "model": model, "rows": rows}, json=json, people=_table)


def _lines(file: Path) -> dict[int, str]:
    """Give the lines that hold text, by their number in the file."""
    from unlearn.errors import UserError

    if not file.is_file():
        raise UserError(f"no file '{file}'", "give a text file with one text per line")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 text", "save it as UTF-8") from error
    texts = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    if not texts:
        raise UserError(f"'{file}' is empty", "give at least one line of text")
    return texts


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text(f"higher = more familiar to {result['model']}")
    table = Table(title=title, title_justify="left", expand=True)
    for name in ("line", "tokens", "loss", "zlib", "min_k"):
        table.add_column(name, justify="right", no_wrap=True, min_width=4 if name == "line" else 7)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in result["rows"]:
        numbers = (
            "–" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "zlib", "min_k")
        )
        table.add_row(str(row["line"]), str(row["tokens"]), *numbers, Text(row["text"]))
    Console().print(table)


def main() -> None:
    """Run the command line."""
    guarded(app)
