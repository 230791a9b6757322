"""What TOFU's summary numbers, membership tests and leaked rows say, in plain sentences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unlearn.evals.leakage import CONFIDENCE
from unlearn.evals.report.ecdf import Distance
from unlearn.evals.report.table import COLUMNS, Row, number
from unlearn.evals.report.verdict import ALPHA, Paragraph, forget_quality, model_utility


def evidence(
    rows: Sequence[Row], ks: float | None, leaked: Sequence[Mapping[str, Any]]
) -> Iterator[Paragraph]:
    """Give the paragraphs for what was measured; nothing for what was not."""
    named = {row.name: row for row in rows}
    if quality := forget_quality(named.get("forget_quality"), ks):
        yield Paragraph("Forget quality", f"{quality} {_meaning(named['forget_quality'])}")
    if utility := model_utility(named.get("model_utility")):
        yield Paragraph("Model utility", utility)
    if said := _leaked(leaked):
        yield Paragraph("Rows given away", said)
    if said := _membership(rows):
        yield Paragraph("Membership", said)


def leakage_rows(leakage: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """List the counts of every model that has them, with the share of leaked rows."""
    found = []
    for who in COLUMNS:
        counts = leakage.get(who)
        if counts and counts["n"]:
            share = counts["leaked"] / counts["n"]
            title = columns.get(who, COLUMNS[who])
            found.append({"who": who, "title": title, **counts, "share": share})
    return found


LEAKED = (
    "A row counts as given away by this rule: {rule}. The bound is Clopper and Pearson's, "
    "one-sided: if the rows were a random sample of such rows, it would lie below the true share 5 "
    "times in 100 at most. Rows about one person are alike, so the true bound is wider.{control}"
)
CONTROL = (
    " The retain model shows what the rule finds in a model that never saw the rows: short answers "
    "and what can be guessed."
)
INTERVALS = (
    "Below a number stands its 95 % bootstrap interval over the rows: where it would likely lie "
    "with other questions of the same kind."
)
ERRORS = "± is one standard error of the mean over the rows."
SURENESS = "“No sure change” and “no sure difference” mean: less than two combined standard errors."
ARROWS = "↓ and ↑ under “Wanted” say in which direction a metric should be; – means neither."
EXACT = "The exact values are in report.json, and on the page behind each number."


def leakage_note(leaked: Sequence[Mapping[str, Any]]) -> str:
    """Say what the rule and the bound mean."""
    if not leaked:
        return ""
    control = CONTROL if any(row["who"] == "retain_model" for row in leaked) else ""
    return LEAKED.format(rule=leaked[0]["rule"], control=control)


def ratio_note(
    apart: Mapping[str, Distance], titles: Mapping[str, str], *, dropped: int = 0
) -> str:
    """Say what the plot of the truth ratios shows."""
    text = (
        "For every truth ratio, the share of the forget rows at or below it. The truth ratio "
        "compares how likely wrong answers are with how likely the reworded true one is; 1 means "
        "that the model prefers neither."
    )
    if "after" in apart:
        text += " The vertical bar is the largest gap to the retain model."
        for who in ("after", "before"):
            text += f" {titles.get(who, who)}: {_test(apart[who])}." if who in apart else ""
        text += " Here p is TOFU's forget quality."
    else:
        text += " Without a retain model there is nothing to compare the curve with."
    if dropped:
        text += f" {dropped} ratios that are not numbers were left out."
    return text


def _test(found: Distance) -> str:
    p = f"p = {number(found.p)}, log10 p = {number(found.log10_p)}"
    return f"KS distance {number(found.distance)}, {p} ({found.n[0]} and {found.n[1]} rows)"


def reading(rows: Sequence[Row]) -> list[str]:
    """List what the signs in the table mean, as far as it has them."""
    cells = [cell for row in rows for who in COLUMNS if (cell := row.cell(who))]
    found = [ARROWS]
    if any(cell.low is not None for cell in cells):
        found.append(INTERVALS)
    if any(cell.standard_error is not None and cell.low is None for cell in cells):
        found.append(ERRORS)
    if any(cell.standard_error is not None for cell in cells):
        found.append(SURENESS)
    return [*found, EXACT]


def percent(share: float) -> str:
    """Write a share in percent; what is above 0 never reads as 0, nor below 100 as 100."""
    if 0 < share < 0.0001:
        return "< 0.01 %"
    if 0.9999 < share < 1:
        return "> 99.99 %"
    digits = 2 if share < 0.01 or share > 0.99 else 1
    return f"{100 * share:.{0 if share in (0, 1) else digits}f} %"


def _meaning(row: Row) -> str:
    assert row.after
    assert row.after.value is not None
    if row.after.value < ALPHA:
        return "A model that never saw the forget set would seldom show such a difference."
    return (
        "A model that never saw the forget set would show the same; so can one that knows the "
        "answers and hides them, one that answers nonsense, and a test on few rows."
    )


def _leaked(leaked: Sequence[Mapping[str, Any]]) -> str:
    found = {row["who"]: row for row in leaked}
    if "after" not in found:
        return ""
    row = found["after"]
    text = (
        f"{row['leaked']} of {row['n']} rows of the forget set are given away "
        f"({row['rule']}): with {100 * CONFIDENCE:.0f} % confidence at most "
        f"{percent(row['upper'])} of such rows."
    )
    if control := found.get("retain_model"):
        text += (
            f" The retain model, which never saw them, gives away {control['leaked']} of "
            f"{control['n']} (at most {percent(control['upper'])})."
        )
    return text


def _membership(rows: Sequence[Row]) -> str:
    attacks = [row for row in rows if row.name.startswith("mia_") and row.after]
    parts = [f"{_attack(row)} {_beside(row)}" for row in attacks]
    text = (
        f"Area under the curve of forget against unseen rows: {'; '.join(parts)}." if parts else ""
    )
    privleak = next((row for row in rows if row.name == "privleak" and row.after), None)
    if privleak:
        text += f" PrivLeak is {_beside(privleak)} %; 0 is what the retain model would have."
    return text.strip()


def _attack(row: Row) -> str:
    return row.title.removeprefix("Membership ")


def _beside(row: Row) -> str:
    assert row.after
    theirs = f" (retain model {number(row.retain_model.value)})" if row.retain_model else ""
    return f"{number(row.after.value)}{theirs}"
