"""Rates and their intervals: golden numbers, hand-derived ties, and properties against counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from unlearn.detect.roc import (
    RESAMPLES,
    auc,
    auc_draws,
    fpr_at_tpr,
    interval,
    resampled,
    roc,
    separation,
    tpr_at_fpr,
)

MEMBERS = [0.9, 0.8, 0.7, 0.55, 0.4, 0.3]
NONMEMBERS = [0.6, 0.5, 0.35, 0.2, 0.1, 0.05]
SIDES = {"members": MEMBERS, "nonmembers": NONMEMBERS}
few_values = st.lists(st.integers(0, 8).map(float), min_size=1, max_size=25)


def test_golden_numbers() -> None:
    """Of 36 pairs members win 6 + 6 + 6 + 5 + 4 + 3 = 30.

    At FPR 0 three members are above 0.6; one false positive in six (16.7 %) lets in 0.55 too.
    95 % of six members are all six: from 0.3 on, three non-members come along.
    """
    assert auc(NONMEMBERS, MEMBERS) == pytest.approx(30 / 36)
    assert tpr_at_fpr(**SIDES, fpr=0.05) == (0.5, 0.0)
    assert tpr_at_fpr(**SIDES, fpr=0.20) == pytest.approx((4 / 6, 1 / 6))
    assert fpr_at_tpr(**SIDES) == (0.5, 1.0)


def test_a_tie_is_never_cut() -> None:
    """Two members and one of two non-members share the highest score: no point lies between."""
    curve = roc(members=[1.0, 1.0], nonmembers=[1.0, 0.0])
    assert curve.thresholds.tolist() == [np.inf, 1.0, 0.0]
    assert curve.tpr.tolist() == [0.0, 1.0, 1.0]
    assert curve.fpr.tolist() == [0.0, 0.5, 1.0]
    assert tpr_at_fpr(members=[1.0, 1.0], nonmembers=[1.0, 0.0], fpr=0.49) == (0.0, 0.0)
    assert tpr_at_fpr(members=[1.0, 1.0], nonmembers=[1.0, 0.0], fpr=0.5) == (1.0, 0.5)


def test_all_equal_scores_are_chance() -> None:
    found = separation(members=[1.0] * 30, nonmembers=[1.0] * 30)
    assert (found.auc.value, found.auc.low, found.auc.high) == (0.5, 0.5, 0.5)
    assert found.tpr_at[0.05].value == 0.0
    assert found.fpr_at_95_tpr.value == 1.0
    assert found.balanced_accuracy.value == 0.5


@given(few_values, few_values)
def test_rates_are_those_of_counting(members: list[float], nonmembers: list[float]) -> None:
    curve = roc(members=members, nonmembers=nonmembers)
    for threshold, tpr, fpr in zip(*curve, strict=True):
        assert tpr == pytest.approx(np.mean(np.array(members) >= threshold))
        assert fpr == pytest.approx(np.mean(np.array(nonmembers) >= threshold))
    area = np.sum((curve.tpr[1:] + curve.tpr[:-1]) / 2 * np.diff(curve.fpr))
    assert auc(nonmembers, members) == pytest.approx(area)
    labels = [0] * len(nonmembers) + [1] * len(members)
    assert auc(nonmembers, members) == pytest.approx(roc_auc_score(labels, nonmembers + members))


@given(few_values, few_values, st.sampled_from([0.01, 0.1, 1 / 3, 0.5, 1.0]))
def test_fixed_rates_are_the_best_that_keep_the_bound(
    members: list[float], nonmembers: list[float], bound: float
) -> None:
    """Against trying every threshold."""
    tries = [np.inf, *members, *nonmembers]
    rates = [(np.mean(np.array(members) >= t), np.mean(np.array(nonmembers) >= t)) for t in tries]
    sides = {"members": members, "nonmembers": nonmembers}
    best = max(tpr for tpr, fpr in rates if fpr <= bound + 1e-12)
    assert tpr_at_fpr(**sides, fpr=bound)[0] == pytest.approx(best)
    least = min(fpr for tpr, fpr in rates if tpr >= bound - 1e-12)
    assert fpr_at_tpr(**sides, tpr=bound)[0] == pytest.approx(least)


def test_the_bootstrap_is_that_of_resampling_rows() -> None:
    """The quick way (counts per threshold) against drawing the texts themselves."""
    members, nonmembers = np.array([*MEMBERS, 0.5]), np.array(NONMEMBERS)
    draws = auc_draws(members=members, nonmembers=nonmembers, seed=3)
    assert draws.shape == (RESAMPLES,)
    no, yes = resampled(6, 3, 0), resampled(7, 3, 1)
    for place in (0, 1, 500, 999):
        low = np.repeat(nonmembers, no[place].astype(int))
        high = np.repeat(members, yes[place].astype(int))
        assert draws[place] == pytest.approx(auc(low, high))
    found = separation(members=members, nonmembers=nonmembers, seed=3)
    assert (found.auc.low, found.auc.high) == interval(draws)


def test_intervals_of_all_rates_are_those_of_resampling_rows() -> None:
    generator = np.random.default_rng(0)
    members, nonmembers = generator.normal(1, 1, 40), generator.normal(0, 1, 100)
    found = separation(members=members, nonmembers=nonmembers)
    no, yes = resampled(100, 0, 0), resampled(40, 0, 1)
    each = [
        (np.repeat(members, y.astype(int)), np.repeat(nonmembers, n.astype(int)))
        for y, n in zip(yes, no, strict=True)
    ]
    tpr = [tpr_at_fpr(members=y, nonmembers=n, fpr=0.05)[0] for y, n in each]
    fpr = [fpr_at_tpr(members=y, nonmembers=n)[0] for y, n in each]
    assert (found.tpr_at[0.05].low, found.tpr_at[0.05].high) == pytest.approx(interval(tpr))
    assert (found.fpr_at_95_tpr.low, found.fpr_at_95_tpr.high) == pytest.approx(interval(fpr))


def test_many_draws_are_made_in_parts_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = auc_draws(**SIDES)
    monkeypatch.setattr("unlearn.detect.roc.DRAWS_AT_ONCE", 12 * 37)
    assert np.array_equal(auc_draws(**SIDES), whole)


def test_an_auc_interval_holds_its_promise() -> None:
    """True AUC of N(1, 1) against N(0, 1) is Φ(1/√2) = 0.760; 95 % of intervals should hold it.

    200 repetitions: the share has a standard error of 1.5 points, so 0.90 to 0.99 is 3 of them.
    """
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        draws = auc_draws(
            members=generator.normal(1, 1, 60), nonmembers=generator.normal(0, 1, 60), seed=seed
        )
        low, high = interval(draws)
        hits += low <= 0.76025 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_clusters_are_drawn_whole() -> None:
    """Two clusters of three equal members each: a draw has one of them, or both, never a half."""
    members, nonmembers = [0.9, 0.9, 0.9, 0.1, 0.1, 0.1], [0.5, 0.5]
    clusters = (["a"] * 3 + ["b"] * 3, [0, 1])
    draws = auc_draws(members=members, nonmembers=nonmembers, clusters=clusters)
    assert set(draws) == {0.0, 0.5, 1.0}
    alone = (list(range(6)), [0, 1])
    assert np.array_equal(
        auc_draws(members=MEMBERS, nonmembers=[0.5, 0.4], clusters=alone),
        auc_draws(members=MEMBERS, nonmembers=[0.5, 0.4]),
    )


def test_intervals_hold_for_texts_that_come_in_clusters() -> None:
    """Ten authors a side, ten texts each; half the variance is the author's; the true AUC is 0.5.

    Intervals over clusters hold it in some 90 % of cases (ten are few), those over texts in far
    fewer.
    """
    generator = np.random.default_rng(5)
    names = np.repeat(np.arange(10), 10)
    hits = np.zeros(2)
    for seed in range(120):
        sides = [(generator.normal(size=10)[names] + generator.normal(size=100)) for _ in range(2)]
        for place, clusters in enumerate((None, (names, names))):
            low, high = interval(
                auc_draws(members=sides[0], nonmembers=sides[1], clusters=clusters, seed=seed)
            )
            hits[place] += low <= 0.5 <= high
    assert hits[0] / 120 < 0.7
    assert hits[1] / 120 > 0.82


def test_the_difference_of_two_scores_on_the_same_texts_is_paired() -> None:
    """A score that is the other one times two differs by nothing, in every draw."""
    ours = auc_draws(**SIDES)
    theirs = auc_draws(members=np.array(MEMBERS) * 2, nonmembers=np.array(NONMEMBERS) * 2)
    assert interval(ours - theirs) == (0.0, 0.0)


def test_rates_that_so_few_texts_cannot_show_are_not_given() -> None:
    found = separation(members=MEMBERS, nonmembers=[0.0] * 100)
    assert found.tpr_at[0.05].value == 1.0
    assert found.tpr_at[0.01].value == 1.0
    assert found.tpr_at[0.001].value is None
    assert found.tpr_at[0.001].note == "needs 1000 non-members; there are 100"
    assert separation(**SIDES).to_dict()["tpr@5%fpr"] == {
        "value": None,
        "note": "needs 20 non-members; there are 6",
    }


@pytest.mark.parametrize("members", [[], [0.1, float("nan")]])
def test_what_is_no_score_is_refused(members: list[float]) -> None:
    with pytest.raises(ValueError, match="score"):
        separation(members=members, nonmembers=NONMEMBERS)
