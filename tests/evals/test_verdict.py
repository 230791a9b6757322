"""What is said about the numbers, by hand, and how numbers are grouped and written."""

import math
import re

import pytest

from unlearn.evals.report.evidence import evidence
from unlearn.evals.report.facts import duration
from unlearn.evals.report.table import Cell, Row, number
from unlearn.evals.report.verdict import headline, verdict
from unlearn.evals.report.write import describe


def row(name: str, before: float, after: float, retain: float | None = None) -> Row:
    cells = [Cell(value, 0.01, 100) for value in (before, after)]
    return Row(name, "lower", *cells, None if retain is None else Cell(retain, 0.01, 100))


def test_the_verdict_by_hand() -> None:
    found = verdict([row("forget_Q_A_Prob", 0.9, 0.3, 0.1), row("retain_Q_A_Prob", 0.8, 0.6, 0.79)])
    assert [paragraph.text for paragraph in found] == [
        "On the forget set (100 rows), the probability of the true answer fell from 0.900 to "
        "0.300.",
        "On the retain set (100 rows), 75.0 % of the probability of the true answer was kept "
        "(0.800 before, 0.600 after).",
        "Compared with the retain model on the forget set, probability is 0.200 above its 0.100. "
        "Compared with the retain model on the retain set, probability is 0.190 below its 0.790. "
        # (0.9 - 0.3) / (0.9 - 0.1)
        "Of the way on the forget set from the model before unlearning to the retain model, 75 % "
        "was covered in probability.",
    ]


def test_a_change_within_the_error_is_not_called_one() -> None:
    # two combined standard errors are 2 * sqrt(2) * 0.01 = 0.0283
    small, large = row("forget_Q_A_Prob", 0.5, 0.475, 0.5), row("forget_Q_A_Prob", 0.5, 0.47, 0.5)
    assert "shows no sure change (0.500 before, 0.475 after)" in verdict([small])[0].text
    assert "no sure change (0.500 before, 0.475 after) on the forget set" in headline([small])
    assert "fell from 0.500 to 0.470" in verdict([large])[0].text
    assert "no sure difference from its 0.500" in verdict([small])[2].text
    assert "covered" not in verdict([large])[2].text  # there was no way to go


def test_failed_unlearning_is_told_as_it_is() -> None:
    rows = [row("forget_Q_A_Prob", 0.5, 0.9), row("retain_Q_A_Prob", 0.9, 0.1)]
    assert headline(rows) == (
        "The probability of the true answers rose from 0.500 to 0.900 on the forget set and fell "
        "from 0.900 to 0.100 on the retain set."
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.000"),
        (1.0, "1.000"),
        (0.02081, "0.021"),
        (-0.5, "-0.500"),
        (0.001, "0.001"),
        (0.00076193, "0.00076"),
        (0.00001234, "0.000012"),
        (1.234e-9, "1.2e-09"),
        (None, "not a number"),
        (math.nan, "not a number"),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


# TOFU's numbers


def tofu(**changes: float) -> list[Row]:
    """Give rows with forget quality and utility; ``changes`` replaces values after unlearning."""
    values = {
        "forget_Q_A_Prob": (0.99, 0.1, 0.05),
        "forget_quality": (1e-50, 0.4, 1.0),
        "model_utility": (0.6, 0.5, 0.59),
        "mia_loss": (0.99, 0.6, 0.5),
        "privleak": (-98.0, -20.0, 0.0),
    }
    return [
        Row(name, "none", *(Cell(v, None, 400, v - 0.01, v + 0.01) for v in
                            (before, changes.get(name, after), retain)))
        for name, (before, after, retain) in values.items()
    ]  # fmt: skip


def test_the_headline_with_forget_quality_and_utility() -> None:
    """An interval of ±0.01 counts as a standard error of 0.005: 0.1 apart is sure."""
    assert headline(tofu(), 0.05) == (
        "The probability of the true answers fell from 0.990 to 0.100 on the forget set. "
        "No difference from the retain model was found in the forget truth ratios "
        "(KS distance 0.050, p = 0.400). Model utility fell from 0.600 to 0.500."
    )
    assert "truth ratios differ from the retain model's (p = 1.0e-10)" in headline(
        tofu(forget_quality=1e-10)
    )
    assert "Model utility shows no sure change (0.600 before, 0.605 after)." in headline(
        tofu(model_utility=0.605)
    )


def test_finding_no_difference_is_never_called_proof() -> None:
    said = {p.heading: p.text for p in evidence(tofu(), 0.05, [])}
    assert "so can one that knows the answers and hides them" in said["Forget quality"]
    assert said["Membership"] == (
        "Area under the curve of forget against unseen rows: by loss 0.600 (retain model 0.500). "
        "PrivLeak is -20.000 (retain model 0.000) %; 0 is what the retain model would have."
    )
    for words in said.values():
        assert not re.search(r"\b(prov|guarantee|certif|erased)", words)


def test_harness_tasks_alone_have_a_headline() -> None:
    task = {"wmdp_bio/acc": 0.31, "mmlu/acc": 0.57}
    run = describe({"metrics": {"after": task}, "details": {}})
    assert run["headline"] == "wmdp_bio/acc is 0.310; and mmlu/acc is 0.570."
    assert [block["title"] for block in run["blocks"]] == ["Other measures"]


def test_metrics_stand_in_their_blocks() -> None:
    names = ["wf_Truth_Ratio", "mia_min_k", "s_mia_loss", "privleak", "ra_Q_A_ROUGE", "mmlu/acc",
             "extraction_strength", "forget_truth_ratio", "retain_Q_A_Prob", "model_utility",
             "forget_quality", "forget_quality_ks"]  # fmt: skip
    run = describe({"metrics": {"after": dict.fromkeys(names, 0.5)}})
    assert {block["title"]: [row["name"] for row in block["rows"]] for block in run["blocks"]} == {
        "Summary": ["forget_quality", "forget_quality_log10_p", "forget_quality_ks",
                    "model_utility"],
        "Forget set": ["extraction_strength", "forget_truth_ratio"],
        "Retain set": ["retain_Q_A_Prob"],
        "Real authors": ["ra_Q_A_ROUGE"],
        "World facts": ["wf_Truth_Ratio"],
        "Privacy": ["privleak", "mia_min_k", "s_mia_loss"],
        "Other measures": ["mmlu/acc"],
    }  # fmt: skip
    assert run["blocks"][0]["rows"][1]["cells"]["after"]["value"] == pytest.approx(math.log10(0.5))


@pytest.mark.parametrize(
    ("started", "finished", "said"),
    [
        ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:09+00:00", "9 s"),
        ("2026-01-01T00:00:00+00:00", "2026-01-01T00:02:05+00:00", "2 min 5 s"),
        ("2026-01-01T00:00:00+00:00", "2026-01-02T01:30:00+00:00", "25 h 30 min"),
        (None, "2026-01-01T00:00:00+00:00", ""),
        ("yesterday", "today", ""),
    ],
)
def test_duration(started: str | None, finished: str, said: str) -> None:
    assert duration(started, finished) == said
