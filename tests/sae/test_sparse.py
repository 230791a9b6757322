"""Lists of active latents: values and gradients of the dense products that they stand for."""

import pytest
import torch
from torch import Tensor

from unlearn.sae.activation import batch_threshold
from unlearn.sae.sparse import Places, combined, entries


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_places_are_listed_token_by_token() -> None:
    """A token without active latents has no entry, and begins where the next one does."""
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    found = Places.of_mask(mask)
    assert (found.tokens.tolist(), found.latents.tolist()) == ([0, 0, 2], [1, 3, 0])
    assert found.starts.tolist() == [0, 2, 2]
    top = Places.of_top(torch.tensor([[3, 1], [0, 2]]))
    assert (top.tokens.tolist(), top.latents.tolist()) == ([0, 0, 1, 1], [3, 1, 0, 2])
    assert top.starts.tolist() == [0, 2]


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_values_and_gradients_are_those_of_dense_products(density: float) -> None:
    """a = relu(x W + b) at the places and 0 elsewhere, decoded; also where no place is active."""
    mask = torch.rand(7, 12, generator=torch.Generator().manual_seed(5)) < density
    mask[3] = False
    x, wanted = draw(7, 4, seed=1), draw(7, 4, seed=2)

    def weights() -> list[Tensor]:
        return [
            one.requires_grad_() for one in (draw(4, 12), draw(12, seed=3), draw(12, 4, seed=4))
        ]

    w_enc, bias, w_dec = ours = weights()
    places = Places.of_mask(mask)
    values = entries(w_enc, bias, x, (x @ w_enc + bias).detach(), places).relu()
    found = combined(values, places, w_dec)
    (found * wanted).sum().backward()
    w_enc, bias, w_dec = dense = weights()
    expected = ((x @ w_enc + bias).relu() * mask) @ w_dec
    (expected * wanted).sum().backward()
    torch.testing.assert_close(found, expected)
    for one, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("number", [1, 40, 700, 3000, 10_000])
@pytest.mark.parametrize("kind", ["normal", "few rows", "rising", "equal"])
def test_the_sample_spares_work_and_changes_nothing(kind: str, number: int) -> None:
    """Against a full sort; also where every sampled value is large, or all values are equal."""
    pre = draw(61, 122)
    if kind == "few rows":
        pre[:, ::61] += 100  # these are what the sample sees
    if kind == "rising":
        pre = torch.arange(61.0 * 122, dtype=torch.float64).view(61, 122) - 200
    if kind == "equal":
        pre = torch.ones_like(pre)
    positive = pre[pre > 0].sort(descending=True).values
    expected = float(positive[:number][-1])
    assert float(batch_threshold(pre, number)) == expected
