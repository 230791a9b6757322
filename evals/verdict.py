"""What the numbers of a run say, in plain sentences: nothing that the numbers do not hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SURE = 2.0
"""A difference counts when it exceeds this many combined standard errors of the two means."""

UNSURE = "shows no sure change"
SMALLEST = 1e-6
"""Numbers below it are written with an exponent."""

PLAIN = {
    "Q_A_Prob": "the probability of the true answer",
    "Q_A_ROUGE": "the overlap of the written answer with the true one",
    "extraction_strength": "extraction strength",
}
SHORT = {"Q_A_Prob": "probability", "Q_A_ROUGE": "overlap"}
SPLITS = {"forget": "forget set", "retain": "retain set"}


@dataclass(frozen=True)
class Cell:
    """One number of the table; ``value`` is None when the model gave nothing finite."""

    value: float | None
    standard_error: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Row:
    """One metric for the model before and after, and for the retain model when there is one."""

    name: str
    direction: str
    before: Cell | None
    after: Cell | None
    retain_model: Cell | None = None

    @property
    def split(self) -> str:
        return self.name.partition("_")[0] if self.name.startswith(("forget_", "retain_")) else ""

    @property
    def measure(self) -> str:
        return self.name.removeprefix(f"{self.split}_")

    @property
    def plain(self) -> str:
        return PLAIN.get(self.measure, self.measure)

    @property
    def short(self) -> str:
        return SHORT.get(self.measure, self.plain)

    @property
    def change(self) -> float | None:
        """After minus before."""
        return difference(self.after, self.before)


@dataclass(frozen=True)
class Paragraph:
    """A few sentences under a short heading."""

    heading: str
    text: str


def number(value: float | None) -> str:
    """Write a number so that it can be read: three decimals, or two digits when it is small."""
    if value is None or not math.isfinite(value):
        return "not a number"
    if value == 0 or abs(value) >= 0.001:
        return f"{value:.3f}"
    if abs(value) < SMALLEST:
        return f"{value:.1e}"
    return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"


def difference(cell: Cell | None, other: Cell | None) -> float | None:
    """Subtract two means; None when either is missing."""
    if cell is None or other is None or cell.value is None or other.value is None:
        return None
    return cell.value - other.value


def is_sure(cell: Cell, other: Cell) -> bool:
    """Say whether two means differ by more than chance among the rows would often give."""
    gap = difference(cell, other)
    error = math.hypot(cell.standard_error or 0.0, other.standard_error or 0.0)
    return gap is not None and abs(gap) > SURE * error


def headline(rows: Sequence[Row]) -> str:
    """Say in one sentence what became of the probability of the true answers."""
    parts: list[str] = []
    verb = ""
    for row in rows:
        if row.measure != "Q_A_Prob" or row.before is None or row.after is None:
            continue
        again, verb = verb, _verb(row)
        said = _before_after(row) if verb == UNSURE else _from_to(row)
        place = f"on the {SPLITS.get(row.split, 'rows')}"
        parts.append(" ".join(([] if verb == again else [verb]) + [said, place]))
    if not parts:
        return "The probability of the true answers was not measured both before and after."
    return f"The probability of the true answers {' and '.join(parts)}."


def verdict(rows: Sequence[Row]) -> list[Paragraph]:
    """Say what fell, what was kept, and how far the result is from the retain model."""
    paragraphs = []
    for split, name in SPLITS.items():
        chosen = [row for row in rows if row.split == split]
        text = _changes(split, chosen) if chosen else f"Nothing was measured on the {name}."
        paragraphs.append(Paragraph(name.capitalize(), text))
    return [*paragraphs, Paragraph("Distance from the retain model", _distance(rows))]


def _changes(split: str, rows: Sequence[Row]) -> str:
    counts = {cell.n for row in rows for cell in (row.before, row.after) if cell and cell.n}
    size = f" ({counts.pop()} rows)" if len(counts) == 1 else ""
    return f"On the {SPLITS[split]}{size}, {_listed([_change(row) for row in rows])}."


def _change(row: Row) -> str:
    if row.before is None or row.after is None:
        return f"{row.plain} was not measured both before and after"
    verb = _verb(row)
    if verb == UNSURE:
        return f"{row.plain} {verb} {_before_after(row)}"
    if verb == "fell" and row.split == "retain" and row.before.value:
        kept = 100 * (row.after.value or 0.0) / row.before.value
        return f"{kept:.1f} % of {row.plain} was kept {_before_after(row)}"
    return f"{row.plain} {verb} {_from_to(row)}"


def _verb(row: Row) -> str:
    assert row.before
    assert row.after
    if row.change is None:
        return "went"
    if not is_sure(row.after, row.before):
        return UNSURE
    return "fell" if row.change < 0 else "rose"


def _from_to(row: Row) -> str:
    assert row.before
    assert row.after
    return f"from {number(row.before.value)} to {number(row.after.value)}"


def _before_after(row: Row) -> str:
    assert row.before
    assert row.after
    return f"({number(row.before.value)} before, {number(row.after.value)} after)"


def _distance(rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row.retain_model is not None]
    if not compared:
        return (
            "No retain model was given, so it is not known how close the result is to a model that "
            "never saw the forget set."
        )
    sentences = []
    for split, name in SPLITS.items():
        chosen = [_gap(row) for row in compared if row.split == split]
        if chosen:
            sentences.append(f"Compared with the retain model on the {name}, {_listed(chosen)}.")
    covered = [text for row in compared if row.split == "forget" and (text := _covered(row))]
    if covered:
        sentences.append(
            "Of the way on the forget set from the model before unlearning to the retain model, "
            f"{_listed(covered)}."
        )
    return " ".join(sentences)


def _gap(row: Row) -> str:
    gap = difference(row.after, row.retain_model)
    if gap is None or row.after is None or row.retain_model is None:
        return f"{row.short} cannot be compared"
    theirs = number(row.retain_model.value)
    if not is_sure(row.after, row.retain_model):
        return f"{row.short} shows no sure difference from its {theirs}"
    return f"{row.short} is {number(abs(gap))} {'above' if gap > 0 else 'below'} its {theirs}"


def _covered(row: Row) -> str:
    """Say which share of the way from the start to the retain model was gone."""
    if row.before is None or row.retain_model is None or not is_sure(row.before, row.retain_model):
        return ""
    way, gone = difference(row.before, row.retain_model), difference(row.before, row.after)
    if way is None or gone is None:
        return ""
    return f"{100 * gone / way:.0f} % was covered in {row.short}"


def _listed(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{'; '.join(first)}; and {last}" if first else last
