"""The ``detect-pretraining`` command: how familiar is each line of a file to a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unlearn.cli.entry import Json, Offline, go_offline, guarded, say

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def detect(
    file: Annotated[Path, typer.Argument(help="Text file, one text per line.")],
    model: Annotated[str, typer.Option(help="Folder or hub name of a causal language model.")],
    k: Annotated[float, typer.Option(help="Share of least likely tokens for Min-K%.")] = 0.2,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Score each line of FILE: higher means the model more likely saw it in training.

    Scores are loss, zlib and Min-K%. They rank texts; alone they prove nothing about one text.
    """
    texts = _lines(file)
    go_offline(offline)
    from unlearn.detect.run import score_texts

    rows = score_texts(model, texts, k=k, offline=offline)
    say({"file": str(file), "model": model, "rows": rows}, json=json, people=_table)


def _lines(file: Path) -> list[str]:
    from unlearn.errors import UserError

    if not file.is_file():
        raise UserError(f"no file '{file}'", "give a text file with one text per line")
    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise UserError(f"'{file}' is empty", "give at least one line of text")
    return texts


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"higher = more familiar to {result['model']}", title_justify="left")
    for name in ("line", "tokens", "loss", "zlib", "min_k"):
        table.add_column(name, justify="right")
    table.add_column("text", no_wrap=True, ratio=1)
    for row in result["rows"]:
        numbers = (
            "–" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "zlib", "min_k")
        )
        table.add_row(str(row["line"]), str(row["tokens"]), *numbers, row["text"])
    Console().print(table)


def main() -> None:
    """Run the command line."""
    guarded(app)
