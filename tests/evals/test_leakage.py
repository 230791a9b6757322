"""Rows still given away, and the Clopper–Pearson bound."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from unlearn.evals.leakage import leakage, upper_bound
from unlearn.evals.report.evidence import leakage_note, leakage_rows, percent


def record(split: str = "forget", **fields: Any) -> dict[str, Any]:
    return {"split": split, **fields}


@pytest.mark.parametrize(
    ("count", "n", "bound"),
    [
        (0, 400, 1 - 0.05 ** (1 / 400)),  # nothing seen: (1 - p)^n = 0.05
        (0, 10, 0.2588656),  # 1 - 0.05^(1/10)
        (1, 10, 0.3941633),  # Clopper and Pearson's tables, one-sided 95 %
        (5, 10, 0.7775589),
        (10, 10, 1.0),
        (0, 1, 0.95),
    ],
)
def test_the_upper_bound_against_known_values(count: int, n: int, bound: float) -> None:
    assert upper_bound(count, n) == pytest.approx(bound, abs=1e-6)


def test_a_two_sided_interval_ends_at_the_975_bound() -> None:
    """0 of 10, two-sided 95 %: 1 - 0.025^(1/10) = 0.308497, the textbook value."""
    assert upper_bound(0, 10, confidence=0.975) == pytest.approx(0.308497, abs=1e-6)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_at_the_bound_so_few_hits_have_a_chance_of_five_percent(case: tuple[int, int]) -> None:
    count, n = case
    bound = upper_bound(count, n)
    assert count / n < bound < 1
    assert binom.cdf(count, n, bound) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize(("count", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_what_is_no_share_is_refused(count: int, n: int) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        upper_bound(count, n)


def test_rows_are_counted_by_either_measure() -> None:
    """Leaked: words at the threshold; tokens above it. Not: below both, another set, no measure."""
    records = [
        record(rouge_l_recall=0.9, extraction_strength=0.1),
        record(rouge_l_recall=0.2, extraction_strength=0.95),
        record(rouge_l_recall=0.89, extraction_strength=0.89),
        record(rouge_l_recall=None, extraction_strength=math.nan),
        record("retain", rouge_l_recall=1.0, extraction_strength=1.0),
    ]
    found = leakage(records)
    assert found == {
        "rule": "ROUGE-L recall ≥ 0.9 or extraction strength ≥ 0.9",
        "leaked": 2,
        "n": 3,
        "upper": upper_bound(2, 3),
    }


def test_the_rule_names_only_what_was_measured() -> None:
    found = leakage([record(extraction_strength=1.0), record(extraction_strength=0.0)])
    assert found is not None
    assert (found["rule"], found["leaked"], found["n"]) == ("extraction strength ≥ 0.9", 1, 2)
    assert leakage([record(prob=0.5)]) is None
    assert leakage([]) is None


def test_the_note_names_the_control_only_when_there_is_one() -> None:
    counts = {"rule": "ROUGE-L recall ≥ 0.9", "leaked": 2, "n": 400, "upper": 0.0157}
    alone = leakage_rows({"after": counts, "retain_model": None}, {"after": "Model"})
    assert [(row["title"], row["share"]) for row in alone] == [("Model", 0.005)]
    assert "retain model" not in leakage_note(alone)
    both = leakage_rows({"after": counts, "retain_model": counts | {"leaked": 0}}, {})
    assert "retain model" in leakage_note(both)
    assert leakage_note([]) == ""


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50.0 %"),
        (0.0075, "0.75 %"),
        (0.0157, "1.6 %"),
        (0.999, "99.90 %"),
        (0.00001, "< 0.01 %"),
        (0.99999, "> 99.99 %"),
    ],
)
def test_a_share_never_reads_as_all_or_nothing(share: float, shown: str) -> None:
    assert percent(share) == shown
