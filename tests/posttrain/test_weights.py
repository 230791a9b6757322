"""Weights of rows by their losses: the published table, bounds, edges, scopes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.posttrain.reweighting import Cached, Rows, Stream, Weighting
from unlearn.posttrain.weights import STRATEGIES, effective_share, factors, sample_weights

LOSSES = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 5.5], dtype=torch.float64)
TABLE = {
    "uniform": [1 / 6] * 6,
    "linupper": [0.023, 0.038, 0.103, 0.279, 0.279, 0.279],
    "upper": [0.039, 0.050, 0.082, 0.135, 0.223, 0.472],
    "quadratic": [0.030, 0.075, 0.248, 0.370, 0.248, 0.030],
    "extremes": [0.319, 0.194, 0.071, 0.026, 0.071, 0.319],
}
"""Of arXiv:2502.06733 with temperature r = 0.4, that is a ratio of e^2.5 = 12.2."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_are_the_published_ones(strategy: str) -> None:
    found = sample_weights(LOSSES, strategy=strategy, max_weight_ratio=math.exp(2.5))
    assert found.tolist() == pytest.approx(TABLE[strategy], abs=6e-4)


def test_uniform_is_uniform_at_any_ratio() -> None:
    """The published README's is not: it gives 0.005 … 0.739 on these losses."""
    found = sample_weights(LOSSES, strategy="uniform", max_weight_ratio=1e6)
    assert found.tolist() == pytest.approx([1 / 6] * 6, abs=1e-15)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=30, deadline=None)
@given(
    losses=st.lists(st.floats(0, 20), min_size=2, max_size=20),
    ratio=st.sampled_from([1.01, math.e, math.exp(2.5), math.exp(10)]),
    scale=st.floats(0.1, 10),
)
def test_weights_sum_to_1_and_are_bounded(
    strategy: str, losses: list[float], ratio: float, scale: float
) -> None:
    values = torch.tensor(losses, dtype=torch.float64)
    found = sample_weights(values, strategy=strategy, max_weight_ratio=ratio)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.max() / found.min()) <= ratio * (1 + 1e-9)
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(1))
    again = sample_weights(values[order], strategy=strategy, max_weight_ratio=ratio)
    torch.testing.assert_close(again, found[order])
    if (values.max() - values.min()) > 0.01 * values.abs().mean():  # h is affine-invariant
        moved = sample_weights(values * scale, strategy=strategy, max_weight_ratio=ratio)
        torch.testing.assert_close(moved, found, rtol=0, atol=1e-9)


def test_effective_share_of_the_example() -> None:
    """1 / sum w^2 is 5.3, 4.1 and 3.0 of 6 rows at r = 1, 0.4 and 0.1."""
    for r, rows in ((1.0, 5.3), (0.4, 4.1), (0.1, 3.0)):
        weights = sample_weights(LOSSES, strategy="linupper", max_weight_ratio=math.exp(1 / r))
        share = effective_share(weights, torch.ones(6, dtype=torch.bool))
        assert 6 * float(share) == pytest.approx(rows, abs=0.05)


def test_rows_without_labels_weigh_nothing_and_change_nothing() -> None:
    losses = torch.tensor([0.0, 1.0, 3.0, 0.0])
    valid = torch.tensor([False, True, True, False])
    found = sample_weights(losses, valid, strategy="upper", max_weight_ratio=3.0)
    assert found.tolist() == pytest.approx([0, 0.25, 0.75, 0])
    nothing = sample_weights(losses, torch.zeros(4, dtype=torch.bool))
    assert nothing.tolist() == [0, 0, 0, 0]
    assert factors(nothing, torch.zeros(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("losses", [[2.0] * 4, [2.0, 2.0 + 1e-6, 2.0 - 1e-6, 2.0], [1.5]])
def test_equal_losses_get_equal_weights(losses: list[float]) -> None:
    """Rounding noise of the losses is not stretched over the whole range."""
    for strategy in STRATEGIES:
        found = sample_weights(torch.tensor(losses), strategy=strategy, max_weight_ratio=100.0)
        assert found.tolist() == pytest.approx([1 / len(losses)] * len(losses), rel=1e-6)


def test_one_bad_row_does_not_press_the_others_together_when_trimmed() -> None:
    losses = torch.cat([torch.linspace(1.0, 3.0, 39, dtype=torch.float64), torch.tensor([40.0])])
    how = {"strategy": "linupper", "max_weight_ratio": 10.0}
    plain, trimmed = (sample_weights(losses, trim=trim, **how) for trim in (0.0, 0.05))
    assert float(plain[38] / plain[0]) < 1.3
    assert float(trimmed[38] / trimmed[0]) == pytest.approx(10.0)


def test_factors_have_mean_1_over_units() -> None:
    weights = sample_weights(LOSSES, strategy="linupper", max_weight_ratio=10.0)
    units = torch.tensor([3.0, 50.0, 1.0, 7.0, 7.0, 20.0], dtype=torch.float64)
    found = factors(weights, units)
    assert float((found * units).sum() / units.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(found / found[0], weights / weights[0])
    even = factors(torch.full((6,), 1 / 6, dtype=torch.float64), units)
    assert even.tolist() == pytest.approx([1.0] * 6)


def test_the_ratio_grows_from_1_after_the_warm_up() -> None:
    """Its logarithm is linear between 10 % and 30 % of the steps."""
    how = Weighting(max_weight_ratio=100.0, warmup=0.1, anneal=0.2)
    assert [how.ratio(at) for at in (0.0, 0.09)] == [1.0, 1.0]
    assert [how.ratio(at) for at in (0.1, 0.2, 0.3, 1.0)] == pytest.approx([1, 10, 100, 100])
    step = Weighting(max_weight_ratio=4.0, warmup=0.5, anneal=0.0)
    assert [step.ratio(at) for at in (0.49, 0.5)] == pytest.approx([1, 4])
    assert Weighting(strategy="uniform", warmup=0.0, anneal=0.0).ratio(0.7) == 1.0


def rows(losses: list[float], units: list[float], index: list[int]) -> Rows:
    return Rows(torch.tensor(losses), torch.tensor(units), torch.tensor(index))


def test_stream_weighs_a_row_by_the_rows_before_and_comes_back_from_its_state() -> None:
    """Window 1 and 3: a loss of 3 or 2 scores 1, of 1 scores 0; mean weight (1/4 + 1) / 2."""
    one = Stream(Weighting(strategy="linupper", max_weight_ratio=4.0, scope="stream"))
    batch = rows([1.0, 3.0, 9.9], [1.0, 1.0, 0.0], [0, 1, -1])
    assert one.factors(batch, 4.0).tolist() == [1.0, 1.0, 0.0]
    one.after_step(batch, 4.0)
    again = Stream(one.how)
    again.load_state_dict(one.state_dict())
    for stream in (one, again):
        assert stream.factors(batch, 4.0).tolist() == pytest.approx([0.4, 1.6, 0.0])
        lone = stream.factors(rows([2.0], [1.0], [5]), 4.0)
        assert lone.tolist() == pytest.approx([1.6])
        assert stream.factors(batch, 1.0).tolist() == [1.0, 1.0, 0.0]


def test_cached_weighs_by_the_epoch_before() -> None:
    """Nothing is known at first, nor of the row that the first epoch left out."""
    one = Cached(Weighting(strategy="upper", scope="cached"), torch.tensor([2.0, 2.0, 1.0]))
    batch = rows([1.0, 3.0, 2.0], [2.0, 2.0, 1.0], [0, 1, 2])
    assert one.factors(batch, 3.0).tolist() == [1, 1, 1]
    one.after_step(rows([1.0, 3.0], [2.0, 2.0], [0, 1]), 3.0)
    assert one.factors(batch, 3.0).tolist() == [1, 1, 1]
    one.after_epoch()
    again = Cached(one.how, one.units)
    again.load_state_dict(one.state_dict())
    swapped = rows([9.0, 0.1, 5.0], [2.0, 2.0, 1.0], [1, 0, 2])
    for cached in (one, again):
        assert cached.factors(swapped, 3.0).tolist() == pytest.approx([1.5, 0.5, 1.0])


def test_fewer_steps_are_needed_where_easy_rows_are_many() -> None:
    """Linear regression, 9 of 10 rows solved at the start: the paper's claim, its direction only.

    The easy rows' losses are near 0 from the beginning; weighting by loss gives the others' share
    of the step back. Steps until the mean loss falls below a hundredth of what it was.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    inputs[20:, 3:] *= 0.01  # the easy rows hardly depend on what is not known yet
    targets = inputs @ torch.tensor([0.0, 0.0, 0.0, 2.0, -1.0], dtype=torch.float64)

    def steps(strategy: str) -> int:
        weight = torch.zeros(5, dtype=torch.float64)
        start = None
        for step in range(2000):
            errors = inputs @ weight - targets
            losses = errors.square()
            start = start or float(losses.mean())
            if float(losses.mean()) < start / 100:
                return step
            share = sample_weights(losses, strategy=strategy, max_weight_ratio=20.0)
            weight = weight - 0.05 * 2 * (share * errors) @ inputs
        return 2000

    assert steps("linupper") < 0.7 * steps("uniform")
