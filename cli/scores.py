"""Scores on stdout: JSON lines as they come, or tables for people."""

from typing import Any, TextIO

from unlearn.cli.render import PLAIN, shortened

MOST_ROWS = 500
"""Rows that a table for people has at most; JSON has them all."""
FEW_ROWS = 10
"""Rows of the table when all of them are in a file."""
MOST_COLUMNS = 5
LEAVE_OUT = ("ppl",)
"""Scores that a table for people does without when there is no room for all of them."""
NOTES = {
    "truncated": "longer than --max-tokens or the model's context: only the beginning was scored",
    "cleaned": "with zero characters or broken surrogates, which were taken out",
    "no_capitals": "without capitals, about which lowercase says nothing",
}
STATUSES = {
    "short": "with fewer tokens than --min-tokens: their scores are noisy",
    "too_short": "without a token to score",
    "nan": "for which the model gave no number",
}
SPAN_WIDTH = 60


class Printer:
    """Shows rows while they come (JSON), or at the end (tables)."""

    def __init__(self, real: TextIO, prepared: Any, *, json: bool, silent: bool) -> None:
        self.real, self.json, self.silent = real, json, silent
        self.prepared = prepared
        self.kept: list[tuple[dict[str, Any], str]] = []
        self.seen = 0

    def show(self, row: dict[str, Any], text: str) -> None:
        """Take one row."""
        from unlearn.detect.output import line

        self.seen += 1
        if self.json and not self.silent:
            self.real.write(line(row))
            self.real.flush()
        elif len(self.kept) < (FEW_ROWS if self.silent else MOST_ROWS) or "spans" in row:
            self.kept.append((row, text))

    def end(self, summary: Any) -> None:
        """Say on stderr what a reader must know and, for people, print the table."""
        import sys

        for counts, words in ((summary.statuses, STATUSES), (summary.notes, NOTES)):
            for name, count in counts.items():
                if name in words:
                    unit = "text" if count == 1 else "texts"
                    print(f"note: {count:,} {unit} {words[name]}", file=sys.stderr)
        if self.silent and self.json:
            counts = {"rows": summary.rows, "statuses": summary.statuses, "notes": summary.notes}
            import json

            print(json.dumps(counts), file=self.real, flush=True)
        elif not self.json:
            self._table(summary)

    def _table(self, summary: Any) -> None:
        from rich.console import Console

        console = Console()
        if self.prepared.is_document:
            for row, _ in self.kept:
                if "spans" in row:
                    self._document(console, row)
        else:
            self._rows(console)
        hidden = self.seen - len(self.kept)
        if hidden and not self.prepared.is_document:
            place = "they are in the file" if self.silent else "--json or --out has them all"
            console.print(f"{hidden:,} more rows are not shown: {place}")
        name = self.prepared.detection.model or "the toy model of the package"
        console.print(f"higher = more likely in the training data of {name}", highlight=False)
        console.print("A score ranks texts. Alone it decides nothing about any of them.")

    def _rows(self, console: Any) -> None:
        from rich.table import Table
        from rich.text import Text

        names = list(self.prepared.scorer.settings.columns)
        if len(names) > MOST_COLUMNS:
            names = [name for name in names if name not in LEAVE_OUT]
        table = Table(expand=True, **PLAIN)
        table.add_column("id", no_wrap=True, overflow="ellipsis", max_width=16)
        for name in ("tokens", *names):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
        for row, text in self.kept:
            values = (_short(row["scores"][name]) for name in names)
            table.add_row(Text(str(row["id"])), str(row["n_tokens"]), *values,
                          Text(shortened(text)))  # fmt: skip
        console.print(table)

    def _document(self, console: Any, row: dict[str, Any]) -> None:
        from rich.text import Text

        calibrated = row["basis"] == "p"
        size = f"{row['n_windows']:,} window{'s' * (row['n_windows'] != 1)}"
        console.print(Text(f"{row['id']}: {row['n_tokens']:,} tokens, {size}"))
        if row["spans"]:
            self._passages(console, row, calibrated=calibrated)
        else:
            console.print("no passage stands out")
        if "verdict" in row:
            console.print(Text(row["verdict"]))

    def _passages(self, console: Any, row: dict[str, Any], *, calibrated: bool) -> None:
        from rich.table import Table
        from rich.text import Text

        judged = "p-values" if calibrated else "ranks within this document"
        console.print(Text(f"longest passages that stand out, by {judged} of {row['judged_by']}"))
        table = Table(**PLAIN)
        for name in ("characters", "tokens", "score", *(["p"] if calibrated else [])):
            table.add_column(name, justify="right", no_wrap=True)
        for span in row["spans"]:
            p = [_short(span["p"])] if calibrated else []
            place = f"{span['start_char']:,} to {span['end_char']:,}"
            table.add_row(place, f"{span['n_tokens']:,}", _short(span["score"]), *p)
        console.print(table)


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
