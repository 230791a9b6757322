"""p-values and what is made of them: numbers by hand, and promised error rates by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.detect.conformal import (
    NotCalibrated,
    benjamini_hochberg,
    bonferroni,
    cauchy_combination,
    check_enough,
    flagged,
    length_matched,
    p_values,
    references_needed,
    share_interval,
    shifted_upwards,
)
from unlearn.errors import UserError

NINE = list(range(1, 10))


def test_p_values_by_hand() -> None:
    """Above all nine: (1 + 0) / 10. At 5, the references 5 to 9 are at least as high: 6 / 10."""
    assert p_values([9.5, 5.0, 0.0], NINE).tolist() == pytest.approx([0.1, 0.6, 1.0])


def test_a_text_or_a_reference_without_a_score_does_not_count() -> None:
    found = p_values([math.nan, 9.5], [*NINE, math.nan])
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(0.1)


def test_equal_scores_give_no_evidence() -> None:
    assert p_values([1.0], [1.0] * 50).tolist() == [1.0]


@pytest.mark.parametrize(("fpr", "needed"), [(0.05, 19), (0.1, 9), (0.01, 99), (0.3, 3)])
def test_the_smallest_p_decides_how_many_references_are_needed(fpr: float, needed: int) -> None:
    """1 / (m + 1) <= 0.05 first holds for m = 19; ceil(1 / 0.3) - 1 = 3."""
    assert references_needed(fpr) == needed
    check_enough(needed, fpr)
    assert flagged(p_values([1.0], [0.0] * needed), fpr).all()
    with pytest.raises(NotCalibrated, match=f"need at least {needed} reference texts"):
        check_enough(needed - 1, fpr)


@pytest.mark.parametrize("fpr", [0.0, 1.0, 5.0, -0.1])
def test_a_rate_that_is_none_is_refused(fpr: float) -> None:
    with pytest.raises(UserError, match="not a rate"):
        check_enough(1000, fpr)


def test_among_non_members_p_keeps_its_promise() -> None:
    """2000 draws of 99 references and one suspect: share(p <= 0.05) is 0.05 (error 0.005)."""
    generator = np.random.default_rng(0)
    hits = [
        bool(flagged(p_values(row[:1], row[1:]), 0.05)[0])
        for row in generator.normal(size=(2000, 100))
    ]
    assert abs(np.mean(hits) - 0.05) < 0.015


def test_references_are_cut_to_the_length_of_the_suspect() -> None:
    """Scores that fall with length: at 2 tokens the references score 2.0, at 8 tokens -4 and -5.

    At its own length the suspect of 2 tokens is nothing unusual (p = 1), against whole references
    it would be (p = 1/4). The third reference has only 3 tokens and does not count at 8.
    """
    tokens = {"a": 20, "b": 10, "c": 3}

    def at(n: int) -> list[float]:
        return [4.0 - n - (name == "b" and n > 5) for name, size in tokens.items() if size >= n]

    p, used = length_matched([2.0, 0.0, 1.0], [2, 8, 30], at)
    assert p[:2].tolist() == pytest.approx([1.0, 1 / 3])
    assert math.isnan(p[2])
    assert used.tolist() == [3, 2, 0]


def test_q_values_by_hand() -> None:
    """Sorted p 0.01 0.02 0.03 0.5 times 4 / rank: 0.04 0.04 0.04 0.5."""
    found = benjamini_hochberg([0.03, 0.5, 0.01, math.nan, 0.02])
    assert found[[0, 1, 2, 4]].tolist() == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert math.isnan(found[3])


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30), st.sampled_from([0.05, 0.1, 0.3]))
def test_q_values_reject_what_the_step_up_rule_rejects(p: list[float], rate: float) -> None:
    """The largest k with p_(k) <= rate k / n, and all below it."""
    ordered = sorted(p)
    passing = [k for k, value in enumerate(ordered, 1) if value <= rate * k / len(p) + 1e-12]
    bound = ordered[passing[-1] - 1] if passing else -1.0
    assert (benjamini_hochberg(p) <= rate + 1e-9).tolist() == [value <= bound for value in p]


def test_the_false_discovery_rate_holds_for_texts_that_share_references() -> None:
    """30 members of 100 texts, 199 references: the mean share of false calls stays below 0.1."""
    generator = np.random.default_rng(2)
    shares = []
    for _ in range(300):
        scores = generator.normal(size=100) + np.repeat([3.0, 0.0], [30, 70])
        called = flagged(benjamini_hochberg(p_values(scores, generator.normal(size=199))), 0.1)
        shares.append(called[30:].sum() / max(1, called.sum()))
    assert 0.04 < np.mean(shares) <= 0.1  # 0.1 times the share of non-members, 0.07


def test_several_scores_cost_their_number() -> None:
    found = bonferroni(
        np.array([[0.01, 0.5, math.nan], [0.2, 0.9, math.nan], [0.3, 0.4, math.nan]])
    )
    assert found[:2].tolist() == pytest.approx([0.03, 1.0])
    assert math.isnan(found[2])


def test_cauchy_combination_by_hand() -> None:
    """tan((0.5 - 0.25) pi) = 1 and tan((0.5 - 0.75) pi) = -1 cancel; equal ones stay."""
    assert cauchy_combination([0.25, 0.75]) == pytest.approx(0.5)
    assert cauchy_combination([0.02] * 7) == pytest.approx(0.02)
    assert cauchy_combination([0.02, math.nan]) == pytest.approx(0.02)
    assert math.isnan(cauchy_combination([]))


def test_a_p_of_one_does_not_outweigh_strong_evidence() -> None:
    """One window of ten is as low as 1e-6: about 10 times that, whatever the other nine are."""
    assert cauchy_combination([1e-6, *[1.0] * 9]) == pytest.approx(1e-5, rel=0.01)


def test_cauchy_combination_keeps_its_promise_for_windows_that_overlap() -> None:
    """Moving averages of noise over 8 places, p-values against 199 references of the same kind."""
    generator = np.random.default_rng(3)
    kernel = np.ones(8) / np.sqrt(8)
    hits = []
    for _ in range(1500):
        windows = np.convolve(generator.normal(size=47), kernel, "valid")[::2]
        hits.append(cauchy_combination(p_values(windows, generator.normal(size=199))) <= 0.05)
    assert np.mean(hits) <= 0.07


def test_a_file_whose_windows_all_score_higher() -> None:
    """Three of three windows above three references: 1 of C(6, 3) = 20 orders."""
    assert shifted_upwards([4, 5, 6], [1, 2, 3]) == pytest.approx(1 / 20)
    assert shifted_upwards([1, 2, 3], [4, 5, 6]) == pytest.approx(1.0)
    assert math.isnan(shifted_upwards([], [1.0]))


def test_share_interval_ends_where_the_tails_do() -> None:
    """0 of 10: the upper end solves (1 - p)^10 = 0.025; 10 of 10 mirrors it."""
    high = 1 - 0.025 ** (1 / 10)
    assert share_interval(0, 10) == pytest.approx((0.0, high))
    assert share_interval(10, 10) == pytest.approx((1 - high, 1.0))
