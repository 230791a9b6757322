import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.errors import UserError
from unlearn.evals.benchmark import Metric
from unlearn.evals.statistics import (
    auc_interval,
    closer_to_1,
    forget_quality,
    harmonic,
    mean_with_interval,
    model_utility,
    readable,
    true_better,
    truth_ratio,
    utility_interval,
)

LN2 = math.log(2)
# the right answer has probability 1/2 per token, the wrong ones 1/4 and 1/16
CORRECT, WRONG = LN2, [2 * LN2, 4 * LN2]
ratios = st.lists(st.integers(1, 60).map(lambda n: n / 7), min_size=2, max_size=40)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("geometric", 1 / 4),  # sqrt(1/4 · 1/16) = 1/8, over 1/2
        ("arithmetic", 5 / 16),  # (1/4 + 1/16) / 2 = 5/32, over 1/2
        ("prob_mean", 4 / 5),  # 1/2 over 1/2 + 1/8
    ],
)
def test_truth_ratio(variant: str, expected: float) -> None:
    assert truth_ratio(CORRECT, WRONG, variant=variant) == pytest.approx(expected)  # type: ignore[arg-type]


def test_truth_ratio_of_many_rows_and_with_the_peers_epsilon() -> None:
    """The second row: wrong 1/2 and 1/2, right 1/8 -> R = 4; epsilon 1/8 doubles 1/8 -> R = 2."""
    found = truth_ratio([CORRECT, 3 * LN2], [WRONG, [LN2, LN2]])
    assert found.tolist() == pytest.approx([1 / 4, 4.0])
    assert truth_ratio(3 * LN2, [LN2, LN2], epsilon=1 / 8) == pytest.approx(2.0)
    # 1/8 / (1/8 + 1/2 + 1/8)
    found = truth_ratio(3 * LN2, [LN2, LN2], variant="prob_mean", epsilon=1 / 8)
    assert found == pytest.approx(1 / 6)


def test_improbable_answers_do_not_underflow() -> None:
    """Both probabilities are below the smallest double; their ratio is e^10 all the same."""
    assert truth_ratio(2000.0, [1990.0]) == pytest.approx(math.exp(10))
    found = truth_ratio(2000.0, [1990.0], variant="prob_mean")
    assert found == pytest.approx(1 / (1 + math.exp(10)))


def test_readings_of_a_truth_ratio() -> None:
    values = [0.25, 1.0, 4.0, 0.0]
    assert closer_to_1(values).tolist() == [0.25, 1.0, 0.25, 0.0]
    assert true_better(values).tolist() == [0.75, 0.0, 0.0, 1.0]
    assert readable(values, "forget").tolist() == [0.25, 1.0, 0.25, 0.0]
    assert readable(values, "ra").tolist() == [0.75, 0.0, 0.0, 1.0]
    assert readable(values, "ra", variant="prob_mean").tolist() == values


def test_forget_quality_of_sets_that_do_not_overlap() -> None:
    """Of the C(6, 3) = 20 orders of 3 + 3 values two keep the sets apart: p = 2/20."""
    found = forget_quality([1, 2, 3], [4, 5, 6])
    assert found.p == pytest.approx(0.1)
    assert found.log10_p == pytest.approx(-1)
    assert found.ks == 1.0


def test_a_model_has_the_forget_quality_one_against_itself() -> None:
    assert forget_quality([0.3, 0.1, 2.0], [2.0, 0.3, 0.1]) == (1.0, 0.0, 0.0)


def test_log10_p_is_finite_where_p_is_too_small_for_a_double() -> None:
    """2 exp(-2 · 300 · 1): log10 = 0.30103 - 600 / 2.302585 = -260.2756."""
    found = forget_quality(np.arange(600), np.arange(600) + 1000)
    assert found.p == 0.0
    assert found.log10_p == pytest.approx(-260.2756, abs=1e-3)


@pytest.mark.parametrize("bad", [[], [0.1, math.nan]])
def test_forget_quality_refuses_what_it_cannot_compare(bad: list[float]) -> None:
    with pytest.raises(UserError, match="truth ratios of the retain model"):
        forget_quality([0.1, 0.2], bad)
    with pytest.raises(UserError, match="truth ratios of the model"):
        forget_quality(bad, [0.1, 0.2])


@settings(deadline=None, max_examples=50)
@given(ratios, ratios)
def test_forget_quality_is_the_same_for_inverse_ratios(
    ours: list[float], theirs: list[float]
) -> None:
    straight = forget_quality(ours, theirs)
    inverse = forget_quality([1 / value for value in ours], [1 / value for value in theirs])
    swapped = forget_quality(theirs, ours)
    assert inverse == pytest.approx(straight)
    assert swapped == pytest.approx(straight)
    logs = forget_quality(np.log(ours), np.log(theirs))
    assert logs == pytest.approx(straight)


def test_model_utility_is_a_harmonic_mean() -> None:
    assert model_utility([1.0, 0.5]) == pytest.approx(2 / 3)
    assert model_utility([0.9] * 8 + [0.0]) == 0.0
    assert math.isnan(model_utility([0.9, math.nan]))


def test_harmonic_mean_of_named_parts() -> None:
    assert harmonic({"a": 1.0, "b": 0.5}) == pytest.approx(2 / 3)
    assert harmonic({"a": 3.0, "b": 1.0}) == 1.0  # parts are clipped to [0, 1]
    assert harmonic({"a": -0.2, "b": 1.0}) == 0.0
    assert harmonic({"a": 1.0, "b": None}) is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=9))
def test_harmonic_mean_lies_between_the_least_and_the_mean(parts: list[float]) -> None:
    found = model_utility(parts)
    assert min(parts) - 1e-9 <= found <= sum(parts) / len(parts) + 1e-9


def test_interval_of_a_mean_is_that_of_the_normal_law_for_many_rows() -> None:
    """Half of 400 rows are 1: the mean's deviation is 0.5/20, 95 % lie within 1.96 of it."""
    values = [0.0, 1.0] * 200
    metric = mean_with_interval(Metric.mean(values, "lower"), values)
    assert metric.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert metric.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)
    assert metric.value == 0.5


def test_intervals_repeat_with_the_seed_and_move_with_it() -> None:
    values = np.linspace(0, 1, 50).tolist()
    metric = Metric.mean(values, "lower")
    assert mean_with_interval(metric, values, seed=3) == mean_with_interval(metric, values, seed=3)
    assert mean_with_interval(metric, values, seed=3) != mean_with_interval(metric, values, seed=4)


def test_rows_without_spread_have_an_interval_without_width() -> None:
    blocks = [[[0.5, 1.0]] * 10, [[1.0, 0.5]] * 20]
    low, high = utility_interval(blocks)  # 4 / (2 + 1 + 1 + 2)
    assert (low, high) == pytest.approx((2 / 3, 2 / 3))


def test_utility_interval_keeps_the_parts_of_a_row_together() -> None:
    """Parts that add up to 1 in every row have means that add up to 1 in every draw.

    The harmonic mean 2 m (1 - m) then never exceeds 1/2; parts drawn apart would exceed it.
    """
    rows = [[value, 1 - value] for value in np.linspace(0.1, 0.9, 12)]
    low, high = utility_interval([rows])
    assert low < high <= 0.5 + 1e-12


def test_auc_interval() -> None:
    assert auc_interval([0.0, 0.1], [1.0, 2.0]) == (1.0, 1.0)
    assert auc_interval([1.0] * 4, [1.0] * 4) == (0.5, 0.5)
    low, high = auc_interval(np.arange(50), np.arange(50) + 10)
    assert 0.5 < low < 0.68 < high < 1  # the AUC is 0.68


def test_nan_rows_have_no_interval() -> None:
    metric = mean_with_interval(Metric.mean([0.1, math.nan], "lower"), [0.1, math.nan])
    assert metric.to_dict()["low"] is None
