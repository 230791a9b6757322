"""Which latents are active, and how strongly: the activation functions of all kinds.

``pre`` is what enters them: x W_enc + b_enc. The ones that choose among a whole batch are given the
tokens of one rank and choose among those of all: the result does not depend on how many there are.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unlearn.ranks import Ranks

Latents = Float[Tensor, "*token latent"]
STRIDE = 61
"""One in so many values is sampled: a prime, so that no latent is left out again and again."""


def top_k(pre: Latents, k: int) -> Latents:
    """Keep the k largest of each token, and of those the positive (Gao et al. 2024)."""
    values, places = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, places, values.relu())


def thresholded(pre: Latents, threshold: Float[Tensor, " latent"]) -> Latents:
    """Keep what is above the latent's threshold and positive: ``relu(pre) * 1[pre > theta]``.

    JumpReLU as Gemma Scope writes it (Lieberum et al. 2024, arXiv:2408.05147).
    """
    return pre.relu() * (pre > threshold)


def gated(pi: Latents, magnitude: Latents) -> Latents:
    """Give ``1[pi > 0] * relu(magnitude)`` (Rajamanoharan et al. 2024, arXiv:2404.16014)."""
    return magnitude.relu() * (pi > 0)


@torch.no_grad()
def batch_threshold(
    pre: Float[Tensor, "token latent"], number: int, ranks: Ranks | None = None
) -> Float[Tensor, ""]:
    """Give the smallest of the ``number`` largest positive values over all tokens and latents.

    What is not below it is active. BatchTopK (Bussmann et al. 2024, arXiv:2412.06410); Mutual
    Choice is the same rule (see :mod:`unlearn.sae.zipf`). Exact ties of it are all active. NaN if
    nothing is positive.
    """
    ranks = ranks or Ranks()
    largest = _largest(pre.flatten(), number)
    if ranks.size > 1:
        sizes = _sizes(len(largest), ranks)
        parts = ranks.gather(largest[None], sizes)
        largest = _largest(torch.cat([part[0] for part in parts]), number)
    return largest.min() if len(largest) else pre.new_tensor(torch.nan)


@torch.no_grad()
def feature_thresholds(
    pre: Float[Tensor, "token latent"],
    counts: Int[Tensor, " latent"],
    ranks: Ranks | None = None,
) -> Float[Tensor, " latent"]:
    """Give the smallest of the ``counts[i]`` largest positive values of each latent i.

    What is not below it is active: Feature Choice. NaN for latents that are positive nowhere. Every
    latent with a positive value is trained, so none stays dead. Inspired by Ayonrinde 2024,
    arXiv:2411.02124; see :mod:`unlearn.sae.zipf`.
    """
    ranks = ranks or Ranks()
    largest = pre.topk(min(int(counts.max()), len(pre)), dim=0).values
    if ranks.size > 1:
        sizes = _sizes(len(largest), ranks)
        largest = torch.cat(ranks.gather(largest.t().contiguous(), sizes), dim=1).t()
        largest = largest.sort(dim=0, descending=True).values
    places = torch.arange(len(largest), device=pre.device)[:, None]
    kept = (places < counts) & (largest > 0)
    smallest = largest.masked_fill(~kept, torch.inf).amin(0)
    return smallest.masked_fill(smallest.isinf(), torch.nan)


def _largest(values: Float[Tensor, " value"], number: int) -> Float[Tensor, " kept"]:
    """Give the ``number`` largest of the positive values, in no order.

    Those below a bound guessed from a sample are put aside first, which spares most of the work;
    where the guess was too high, all positive values are looked through.
    """
    bound = _bound(values[::STRIDE], 1 + number // STRIDE)
    kept = values[values > bound]
    if len(kept) < number and bound > 0:
        kept = values[values > 0]
    return kept.topk(number, sorted=False).values if len(kept) > number else kept


def _bound(sample: Float[Tensor, " value"], number: int) -> float:
    """Give what is almost surely less than the ``number``-th largest, and not negative."""
    safe = int(1.1 * number + 4 * number**0.5)
    return max(0.0, float(sample.topk(safe, sorted=True).values[-1])) if safe < len(sample) else 0.0


def _sizes(own: int, ranks: Ranks) -> list[int]:
    found = ranks.gather(torch.tensor([[own]]), [1] * ranks.size)
    return [int(part) for part in found]


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return thresholded(pre, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = _window(pre, threshold, ctx.bandwidth)
        to_threshold = -(threshold / ctx.bandwidth) * window * grad
        return grad * ((pre > threshold) & (pre > 0)), to_threshold.sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = _window(pre, threshold, ctx.bandwidth)
        return None, (-(1.0 / ctx.bandwidth) * window * grad).sum(0), None


def _window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Bool[Tensor, "token latent"]:
    return ((pre - threshold) / bandwidth).abs() < 0.5


def jump(
    pre: Float[Tensor, "token latent"], threshold: Float[Tensor, " latent"], bandwidth: float
) -> Float[Tensor, "token latent"]:
    """Give :func:`thresholded`, with a gradient for the threshold.

    d a/d theta = -(theta / bandwidth) 1[|pre - theta| < bandwidth/2], d a/d pre = 1[pre > theta]:
    the straight-through estimate of Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    return _Jump.apply(pre, threshold, bandwidth)


def step(
    pre: Float[Tensor, "token latent"], threshold: Float[Tensor, " latent"], bandwidth: float
) -> Float[Tensor, "token latent"]:
    """Give ``1[pre > theta]``, whose sum is the L0, with a gradient for the threshold alone.

    d H/d theta = -(1 / bandwidth) 1[|pre - theta| < bandwidth/2]: arXiv:2407.14435.
    """
    return _Step.apply(pre, threshold, bandwidth)
