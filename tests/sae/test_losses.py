"""Activation functions that choose among a batch, losses and their gradients."""

import math

import pytest
import torch

from unlearn.sae import losses
from unlearn.sae.activation import batch_threshold, feature_thresholds, jump, step
from unlearn.sae.zipf import Zipf, budgets, need


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("number", [1, 7, 20, 35, 60])
def test_a_batch_keeps_its_largest_positive_values(number: int) -> None:
    """Of 60 values about half are positive: a larger number keeps those alone."""
    pre = draw(6, 10)
    smallest = batch_threshold(pre, number)
    best = sorted((value for value in pre.flatten().tolist() if value > 0), reverse=True)[:number]
    assert sorted(pre[pre >= smallest].tolist(), reverse=True) == best
    assert smallest.item() == best[-1]


def test_nothing_positive_keeps_nothing() -> None:
    pre = -draw(3, 4).abs()
    assert batch_threshold(pre, 5).isnan()
    assert feature_thresholds(pre, torch.tensor([1, 2, 3, 3])).isnan().all()
    assert not (pre >= torch.nan).any()


def test_each_latent_keeps_its_own_number_of_tokens() -> None:
    pre, counts = draw(9, 5), torch.tensor([1, 2, 4, 9, 20])
    smallest = feature_thresholds(pre, counts)
    for latent, count in enumerate(counts.tolist()):
        column = pre[:, latent]
        best = sorted((value for value in column.tolist() if value > 0), reverse=True)[:count]
        assert sorted(column[column >= smallest[latent]].tolist(), reverse=True) == best
        assert smallest[latent].item() == best[-1]


def test_gradients_of_jumps_are_those_of_the_papers() -> None:
    """Where |pre - theta| < e/2, d a/d theta is -theta/e and d H/d theta is -1/e; 0 elsewhere."""
    pre, theta, width = draw(50, 4).requires_grad_(), torch.rand(4).double() + 0.1, 0.5
    theta.requires_grad_()
    weights = draw(50, 4, seed=1)
    (jump(pre, theta, width) * weights).sum().backward()
    inside = ((pre - theta) / width).abs() < 0.5
    assert 5 < int(inside.sum()) < 150
    assert pre.grad is not None
    torch.testing.assert_close(pre.grad, weights * (pre > theta))
    torch.testing.assert_close(theta.grad, (-theta / width * inside * weights).sum(0))
    theta.grad, pre.grad = None, None
    (step(pre, theta, width) * weights).sum().backward()
    assert pre.grad is None
    torch.testing.assert_close(theta.grad, (-1 / width * inside * weights).sum(0))


def test_the_threshold_gradient_is_that_of_the_expected_loss() -> None:
    """Over many tokens the estimate meets finite differences of the true mean L0 and mean a.

    pre is uniform on (0, 1): E H(pre - theta) = 1 - theta has slope -1; E a = (1 - theta²)/2 has
    slope -theta.
    """
    pre = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    theta = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    step(pre, theta, 0.1).mean().backward()
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(-1.0, rel=1e-3)
    theta.grad = None
    jump(pre, theta, 0.1).mean().backward()
    assert theta.grad.item() == pytest.approx(-0.4, rel=1e-3)


def test_penalties_by_hand() -> None:
    """Latents 1, 0, 2 with lengths 1, 5, 0.5: L1 = 2; L0 = 2; tanh(4) + tanh(4)."""
    latents, norms = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([1.0, 5.0, 0.5])
    assert losses.l1(latents, norms).tolist() == [2.0]
    assert losses.l0(latents, torch.full((3,), 0.5), 0.1).tolist() == [2.0]
    assert losses.tanh_l0(latents, norms).item() == pytest.approx(2 * math.tanh(4))
    dead = torch.tensor([False, True, True])
    pulled = losses.pre_activation(latents, torch.full((3,), 0.5), norms, dead)
    assert pulled.tolist() == [2.5]  # 0.5 below its threshold, times length 5


def test_the_gate_alone_reconstructs_without_moving_the_decoder() -> None:
    x, pi = draw(4, 3), draw(4, 6, seed=1).requires_grad_()
    w_dec, b_dec = draw(6, 3, seed=2).requires_grad_(), draw(3, seed=3).requires_grad_()
    found = losses.gate_error(x, pi, w_dec, b_dec)
    expected = (x - pi.clamp(min=0) @ w_dec - b_dec).pow(2).sum(-1)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert pi.grad is not None
    assert w_dec.grad is None
    assert b_dec.grad is None


def naive_aux(error, pre, w_dec, dead, k_aux):  # type: ignore[no-untyped-def]
    """Token by token: the k_aux largest dead latents, decoded, against what was left over."""
    found = []
    for token in range(len(pre)):
        order = sorted((f for f in range(pre.shape[1]) if dead[f]), key=lambda f: -pre[token, f])
        guess = sum((max(0.0, pre[token, f].item()) * w_dec[f] for f in order[:k_aux]),
                    torch.zeros(w_dec.shape[1], dtype=torch.float64))  # fmt: skip
        scale = min(int(dead.sum()) / k_aux, 1.0)
        found.append(scale * float((guess - error[token]).square().sum()))
    return found


@pytest.mark.parametrize("num_dead", [1, 4, 9])
def test_aux_k_is_its_formula_and_aux_zipf_with_needs_of_0_and_1(num_dead: int) -> None:
    error, pre, w_dec = draw(7, 3), draw(7, 9, seed=1), draw(9, 3, seed=2)
    dead = torch.arange(9) < num_dead
    found = losses.aux_k(error, pre, w_dec, dead, 4)
    assert found.tolist() == pytest.approx(naive_aux(error, pre, w_dec, dead, 4))
    torch.testing.assert_close(losses.aux_zipf(error, pre, w_dec, dead.double(), 4), found)


def test_without_dead_latents_the_auxiliary_loss_and_its_gradient_are_0() -> None:
    error, pre = draw(7, 3), draw(7, 9, seed=1).requires_grad_()
    found = losses.aux_k(error, pre, draw(9, 3), torch.zeros(9, dtype=torch.bool), 4)
    found.sum().backward()
    assert not found.any()
    assert pre.grad is not None
    assert not pre.grad.any()


def test_zipfs_law_is_found_again_and_shares_follow_ranks() -> None:
    law = Zipf(1.3, 4.0)
    shares = law.shares(400)
    assert float(shares.sum()) == pytest.approx(1.0)
    assert float(shares[0] / shares[1]) == pytest.approx((5 / 4) ** 1.3)
    found = Zipf.fit(shares[torch.randperm(400, generator=torch.Generator().manual_seed(0))])
    assert found.alpha == pytest.approx(1.3, rel=0.02)
    assert Zipf.fit(torch.zeros(5)).alpha == 0.0
    steep = Zipf(500.0, 4096.0).shares(3)
    assert float(steep.sum()) == pytest.approx(1.0)
    assert float(steep[1] / steep[0]) == pytest.approx((4096 / 4097) ** 500)
    places = law.of_latents(torch.tensor([0.1, 0.5, 0.2]))
    assert places.argsort(descending=True).tolist() == [1, 2, 0]


def test_budgets_and_needs_by_hand() -> None:
    """Of 100 pairs: 60, 39.6 and 0.4 make 60, 40 and at least 1."""
    assert budgets(torch.tensor([0.6, 0.396, 0.004]), 100).tolist() == [60, 40, 1]
    told = need(torch.tensor([0.0, 0.1, 0.2, 0.4]), torch.tensor([0.2, 0.2, 0.2, 0.2]))
    assert told.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])
