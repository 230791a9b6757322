"""What the numbers of a run say, in plain sentences: nothing that the numbers do not hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unlearn.evals.report.table import (
    POST_TRAINING,
    SPLITS,
    Cell,
    Row,
    difference,
    is_post_training,
    number,
)

SURE = 2.0
"""A difference counts when it exceeds this many combined standard errors of the two means."""

ALPHA = 0.05
"""Two sets of truth ratios are said to differ when the p of their test is below it."""

UNSURE = "shows no sure change"

PLAIN = {
    "Q_A_Prob": "the probability of the true answer",
    "Q_A_Prob_normalised": "the share of the true answer among the options",
    "Q_A_ROUGE": "the overlap of the written answer with the true one",
    "extraction_strength": "extraction strength",
    "loss": "the loss per token",
    "logp": "the log-probability per token",
    "accuracy": "the share told apart",
    "margin": "the margin per token between the two answers",
    "pass_at_1": "the share of right answers (pass@1)",
    "unfinished": "the share of its answers that do not end",
}
"""The measures that are put into words; the table has the others."""

SHORT = {
    "Q_A_Prob": "probability",
    "Q_A_Prob_normalised": "the share among the options",
    "Q_A_ROUGE": "overlap",
}
OTHERS = 4
"""Measures named in the headline of a report without forget and retain sets."""

ALWAYS = ("forget", "retain")
"""Sets of which a report says so when nothing was measured on them."""


@dataclass(frozen=True)
class Paragraph:
    """A few sentences under a short heading."""

    heading: str
    text: str


def is_sure(cell: Cell, other: Cell) -> bool:
    """Say whether two means differ by more than chance among the rows would often give."""
    gap = difference(cell, other)
    error = math.hypot(spread(cell) or 0.0, spread(other) or 0.0)
    return gap is not None and abs(gap) > SURE * error


def spread(cell: Cell) -> float | None:
    """Give the standard error; where only an interval is known, a quarter of its width."""
    if cell.standard_error is None and cell.low is not None and cell.high is not None:
        return (cell.high - cell.low) / (2 * SURE)
    return cell.standard_error


def headline(rows: Sequence[Row], ks: float | None = None) -> str:
    """Say in a sentence each what became of the true answers, of forget quality and of utility.

    ``ks`` is the KS distance of the forget truth ratios to the retain model's, where it is known.
    """
    named = {row.name: row for row in rows}
    sentences = [_answers(rows)]
    if quality := forget_quality(named.get("forget_quality"), ks):
        sentences.append(quality)
    if utility := model_utility(named.get("model_utility")):
        sentences.append(utility)
    return " ".join(sentences)


def _answers(rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if row.measure == "Q_A_Prob" and row.split in ALWAYS]
    alone = not any(row.before for row in rows)
    others = [row for row in rows if row.block in (*POST_TRAINING, "math", "other") and row.after]
    if not chosen and others:
        said = _listed([_other(row, alone=alone) for row in _main(others)])
        return f"{said[0].upper() if is_post_training(rows) else said[0]}{said[1:]}."
    return _found(chosen) if alone else _changed(chosen)


def _main(rows: Sequence[Row]) -> Sequence[Row]:
    """Choose what the headline names: of post-training what is put into words, held out first."""
    if not is_post_training(rows):
        return rows[:OTHERS]
    order = ("math", *POST_TRAINING)
    named = [row for row in rows if row.split in order and row.measure in PLAIN]
    return sorted(named, key=lambda row: order.index(row.split))[:OTHERS]


def _other(row: Row, *, alone: bool) -> str:
    """Say what became of a measure without a name in words, such as a harness task."""
    assert row.after
    name = f"{PLAIN[row.measure]} on the {SPLITS[row.split]}" if row.measure in PLAIN else row.name
    if alone or row.before is None:
        return f"{name} is {number(row.after.value)}{_theirs(row)}"
    verb = _verb(row)
    return f"{name} {verb} {_before_after(row) if verb == UNSURE else _from_to(row)}"


def _changed(rows: Sequence[Row]) -> str:
    parts: list[str] = []
    verb = ""
    for row in rows:
        if row.before is None or row.after is None:
            continue
        again, verb = verb, _verb(row)
        said = _before_after(row) if verb == UNSURE else _from_to(row)
        place = f"on the {SPLITS[row.split]}"
        parts.append(" ".join(([] if verb == again else [verb]) + [said, place]))
    if not parts:
        return "The probability of the true answers was not measured both before and after."
    return f"The probability of the true answers {' and '.join(parts)}."


def _found(rows: Sequence[Row]) -> str:
    """Say what one model alone gives the true answers, beside the retain model if there is one."""
    parts = [
        f"{number(row.after.value)} on the {SPLITS[row.split]}{_theirs(row)}"
        for row in rows
        if row.after is not None
    ]
    if not parts:
        return "The probability of the true answers was not measured."
    return f"The probability of the true answers is {' and '.join(parts)}."


def _theirs(row: Row) -> str:
    return f" (retain model: {number(row.retain_model.value)})" if row.retain_model else ""


def forget_quality(row: Row | None, ks: float | None = None) -> str:
    """Say whether the model's truth ratios were told apart from the retain model's."""
    if row is None or row.after is None or row.after.value is None:
        return ""
    distance = "" if ks is None else f"KS distance {number(ks)}, "
    test = f"({distance}p = {number(row.after.value)})"
    if row.after.value < ALPHA:
        return f"On the forget set its truth ratios differ from the retain model's {test}."
    return f"No difference from the retain model was found in the forget truth ratios {test}."


def model_utility(row: Row | None) -> str:
    """Say what became of model utility."""
    if row is None or row.after is None:
        return ""
    if row.before is None:
        return f"Model utility is {number(row.after.value)}{_theirs(row)}."
    verb = _verb(row)
    said = _before_after(row) if verb == UNSURE else _from_to(row)
    return f"Model utility {verb} {said}."


def verdict(rows: Sequence[Row]) -> list[Paragraph]:
    """Say what fell, what was kept, and how far the result is from the retain model."""
    alone = not any(row.before for row in rows)
    paragraphs = []
    for split, name in SPLITS.items():
        chosen = [row for row in rows if row.split == split and row.measure in PLAIN]
        if any(row.measure.endswith("_normalised") for row in chosen):
            chosen = [row for row in chosen if row.measure != "Q_A_Prob"]
        if chosen:
            paragraphs.append(Paragraph(name.capitalize(), _set(split, chosen, alone=alone)))
        elif split in ALWAYS and any(row.split in ALWAYS for row in rows):
            paragraphs.append(Paragraph(name.capitalize(), f"Nothing was measured on the {name}."))
    if is_post_training(rows):  # nothing was to be forgotten
        return paragraphs
    return [*paragraphs, Paragraph("Distance from the retain model", _distance(rows))]


def _set(split: str, rows: Sequence[Row], *, alone: bool) -> str:
    counts = {cell.n for row in rows for cell in (row.before, row.after) if cell and cell.n}
    size = f" ({counts.pop()} rows)" if len(counts) == 1 else ""
    said = _listed([_level(row) if alone else _change(row) for row in rows])
    return f"On the {SPLITS[split]}{size}, {said}."


def _level(row: Row) -> str:
    if row.after is None:
        return f"{PLAIN[row.measure]} was not measured"
    return f"{PLAIN[row.measure]} is {number(row.after.value)}{_theirs(row)}"


def _change(row: Row) -> str:
    if row.before is None or row.after is None:
        return f"{PLAIN[row.measure]} was not measured both before and after"
    verb = _verb(row)
    if verb == UNSURE:
        return f"{PLAIN[row.measure]} {verb} {_before_after(row)}"
    if verb == "fell" and row.split == "retain" and row.before.value:
        kept = 100 * (row.after.value or 0.0) / row.before.value
        return f"{kept:.1f} % of {PLAIN[row.measure]} was kept {_before_after(row)}"
    return f"{PLAIN[row.measure]} {verb} {_from_to(row)}"


def _verb(row: Row) -> str:
    assert row.before
    assert row.after
    if row.change is None:
        return "went"
    if spread(row.after) is None and spread(row.before) is None:
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
    compared = [row for row in rows if row.retain_model is not None and row.measure in PLAIN]
    if not any(row.retain_model for row in rows):
        return (
            "No retain model was given, so it is not known how close the result is to a model that "
            "never saw the forget set."
        )
    sentences = []
    for split, name in ((split, SPLITS[split]) for split in ALWAYS):
        chosen = [_gap(row) for row in compared if row.split == split]
        if chosen:
            sentences.append(f"Compared with the retain model on the {name}, {_listed(chosen)}.")
    covered = [text for row in compared if row.split == "forget" and (text := _covered(row))]
    if covered:
        sentences.append(
            "Of the way on the forget set from the model before unlearning to the retain model, "
            f"{_listed(covered)}."
        )
    return " ".join(sentences) or "None of the main measures was taken on the retain model."


def _gap(row: Row) -> str:
    gap = difference(row.after, row.retain_model)
    if gap is None or row.after is None or row.retain_model is None:
        return f"{_short(row)} cannot be compared"
    theirs = number(row.retain_model.value)
    if not is_sure(row.after, row.retain_model):
        return f"{_short(row)} shows no sure difference from its {theirs}"
    return f"{_short(row)} is {number(abs(gap))} {'above' if gap > 0 else 'below'} its {theirs}"


def _covered(row: Row) -> str:
    """Say which share of the way from the start to the retain model was gone."""
    if row.before is None or row.retain_model is None or not is_sure(row.before, row.retain_model):
        return ""
    way, gone = difference(row.before, row.retain_model), difference(row.before, row.after)
    if way is None or gone is None:
        return ""
    return f"{100 * gone / way:.0f} % was covered in {_short(row)}"


def _short(row: Row) -> str:
    return SHORT.get(row.measure, PLAIN[row.measure])


def _listed(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{'; '.join(first)}; and {last}" if first else last
