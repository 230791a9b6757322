"""The active latents of a batch as a list: what they cost grows with k, not with all latents.

Of k active among F latents a dense step multiplies, forwards and backwards, by F - k zeros. Here
only the encoder's product is dense, because the choice needs it; decoding it, and the gradients of
both matrices, gather and add up the rows of active latents alone. The numbers are the same, summed
in another order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

Directions = Float[Tensor, "latent width"]


@dataclass(frozen=True)
class Places:
    """Which latents are active: entry n is ``latents[n]`` of token ``tokens[n]``, token by token.

    ``starts``: the first entry of each token.
    """

    tokens: Int[Tensor, " active"]
    latents: Int[Tensor, " active"]
    starts: Int[Tensor, " token"]

    @classmethod
    def of_top(cls, places: Int[Tensor, "token k"]) -> "Places":
        """Take the places of the k largest of each token."""
        number, k = places.shape
        tokens = torch.arange(number, device=places.device)
        return cls(tokens.repeat_interleave(k), places.flatten(), tokens * k)

    @classmethod
    def of_mask(cls, mask: Bool[Tensor, "token latent"]) -> "Places":
        """Take the places that are marked."""
        tokens, latents = mask.nonzero(as_tuple=True)
        return cls(tokens, latents, _starts(tokens, len(mask)))


def _starts(sorted_places: Int[Tensor, " active"], number: int) -> Int[Tensor, " number"]:
    counts = torch.bincount(sorted_places, minlength=number)
    return counts.cumsum(0) - counts


def combined(
    values: Float[Tensor, " active"], places: Places, directions: Directions
) -> Float[Tensor, "token width"]:
    """Give ``sum_f a_f W_dec[f]`` of every token, the a_f being ``values`` and all others 0."""
    return embedding_bag(
        places.latents, directions, places.starts, mode="sum", per_sample_weights=values
    )


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w_enc: Tensor, bias: Tensor, x: Tensor, pre: Tensor, places: Places
    ) -> Tensor:
        ctx.x, ctx.places, ctx.number = x, places, len(bias)
        return pre[places.tokens, places.latents]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        latents, order = ctx.places.latents.sort(stable=True)
        tokens, starts, grad = ctx.places.tokens[order], _starts(latents, ctx.number), grad[order]
        to_w = embedding_bag(tokens, ctx.x, starts, mode="sum", per_sample_weights=grad)
        to_bias = grad.new_zeros(ctx.number).index_add_(0, latents, grad)
        return to_w.t(), to_bias, None, None, None


def entries(
    w_enc: Float[Tensor, "width latent"],
    bias: Float[Tensor, " latent"],
    x: Float[Tensor, "token width"],
    pre: Float[Tensor, "token latent"],
    places: Places,
) -> Float[Tensor, " active"]:
    """Give some entries of ``pre``, which is x W_enc + bias, with the gradients of both.

    That of W_enc is x^T G, where G is 0 but at the places: a sum of rows of x for each latent.
    """
    found: Tensor = _Entries.apply(w_enc, bias, x, pre, places)
    return found
