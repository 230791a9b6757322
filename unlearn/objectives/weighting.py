"""How much each token of an answer counts: soft weights, granularities, chosen shares of tokens.

Every function is pure and gives weights without gradient. A weight is made from the probability of
what it weighs (:func:`saturation`, :func:`importance`), spread over tokens, groups, answers or the
batch (:func:`granular`), or is one of two values, by a choice of tokens (:func:`chosen`).
Sources: SatImp (Yang et al. 2025, arXiv:2505.11953); G-effect (Wang et al. 2025, arXiv:2502.19301).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unlearn.scores import Scores

Granularity = Literal["token", "instance", "batch", "group"]
Sampling = Literal["topk", "bottomk", "random"]
Weigh = Callable[[Tensor], Tensor]
"""From log-probabilities (nats) to weights, element by element."""

# odd constants of the splitmix64 hash, as signed 64-bit integers; products wrap around
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def saturation(log_probs: Float[Tensor, "..."], beta: float) -> Float[Tensor, "..."]:
    """Weigh by how well something is still known: ``p^beta``, in [0, 1]."""
    return (beta * log_probs).exp()


def importance(log_probs: Float[Tensor, "..."], beta: float) -> Float[Tensor, "..."]:
    """Weigh by how hard something is to predict: ``(1 - p)^beta``, in [0, 1]."""
    return (-torch.expm1(log_probs)).clamp_min(0.0).pow(beta)


def both(beta1: float, beta2: float) -> Weigh:
    """Give SatImp's weight ``p^beta1 (1 - p)^beta2``."""
    return partial(_both, beta1=beta1, beta2=beta2)


def _both(log_probs: Tensor, beta1: float, beta2: float) -> Tensor:
    return saturation(log_probs, beta1) * importance(log_probs, beta2)


@torch.no_grad()
def granular(
    policy: Scores, weigh: Weigh, granularity: Granularity, group_size: int
) -> Float[Tensor, "batch seq"] | Float[Tensor, " batch"]:
    """Weigh each token, each group of tokens, each answer, or the whole batch.

    ``token``: by the token's probability. ``group``: each token by the mean weight of its group;
    the tokens of an answer are sorted by weight, descending, and every ``group_size`` of them form
    a group (the last one may be smaller). ``instance``: by the probability of the whole answer.
    ``batch``: by the mean of that over the answers of one forward pass.
    """
    if granularity == "token":
        return weigh(policy.log_probs)
    if granularity == "group":
        return group_means(weigh(policy.log_probs), policy.mask, group_size)
    answers = weigh(policy.sequence)
    if granularity == "instance":
        return answers
    real = policy.attended.any(-1)
    return (answers * real).sum().div(real.sum().clamp_min(1)).expand_as(answers)


def group_means(
    weights: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], size: int
) -> Float[Tensor, "batch seq"]:
    """Replace each labelled token's weight by the mean of its group; see :func:`granular`.

    Groups end with the answer's real length (the published code assumes 499 positions).
    """
    ranked, order = weights.masked_fill(~mask, -torch.inf).sort(dim=-1, descending=True)
    real = ranked.isfinite()
    group = (torch.arange(mask.shape[1], device=mask.device) // size).expand_as(order)
    empty = weights.new_zeros(len(weights), -(-mask.shape[1] // size))
    sums = empty.scatter_add(1, group, ranked.masked_fill(~real, 0.0))
    counts = empty.scatter_add(1, group, real.to(weights.dtype))
    means = (sums / counts.clamp_min(1)).gather(1, group)
    return torch.zeros_like(weights).scatter(1, order, means * real)


@torch.no_grad()
def chosen(
    policy: Scores, sampling: Sampling, fraction: float, seed: int
) -> Bool[Tensor, "batch seq"]:
    """Choose about ``fraction`` of each answer's labelled tokens.

    ``topk``: those with the highest loss; ``bottomk``: with the lowest; ``random``: with the
    highest of :func:`draws`. A quantile per answer is the bound, and a token on it is not chosen,
    as in the published code: an answer of one token is never chosen from.
    """
    values = draws(policy, seed) if sampling == "random" else -policy.log_probs
    if sampling == "bottomk":
        values = -values
    known = values.masked_fill(~policy.mask, torch.nan)
    return known > known.nanquantile(1.0 - fraction, dim=-1, keepdim=True)


def draws(policy: Scores, seed: int) -> Float[Tensor, "batch seq"]:
    """Give each labelled token a number in [0, 1) that looks random and always is the same.

    It is a hash of the seed, the labelled tokens of the row and the token's place among them. So
    neither batch size, accumulation, ranks, padding nor the epoch change it: a token that is chosen
    stays chosen for the whole run, and equal answers are treated alike.
    """
    assert policy.next_tokens is not None
    place = policy.mask.cumsum(-1)
    tokens = _hashed(policy.next_tokens * _GOLDEN + place).masked_fill(~policy.mask, 0)
    row = _hashed(tokens.sum(-1, keepdim=True) + _hashed(torch.full_like(place[:, :1], seed)))
    bits = (_hashed(row + place * _GOLDEN) >> 40) & 0xFFFFFF  # exact in fp32
    return bits.to(policy.log_probs.dtype) / 2**24


def _hashed(values: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Scramble 64-bit integers (splitmix64, Steele et al. 2014), the same on every device."""
    values = (values ^ ((values >> 30) & (2**34 - 1))) * _FIRST
    values = (values ^ ((values >> 27) & (2**37 - 1))) * _SECOND
    return values ^ ((values >> 31) & (2**33 - 1))


def two_valued(
    selected: Bool[Tensor, "batch seq"], weight: float, like: Scores
) -> Float[Tensor, "batch seq"]:
    """Give selected tokens ``weight`` and the others ``1 - weight``."""
    values = torch.full_like(like.log_probs, 1.0 - weight, requires_grad=False)
    return values.masked_fill(selected, weight)


def annotated(policy: Scores, weight: float) -> Float[Tensor, "batch seq"]:
    """Give tokens that the data names as important ``weight`` and the others ``1 - weight``."""
    assert policy.important is not None
    return two_valued(policy.important, weight, policy)


def couples_rows(hyper: Mapping[str, Any]) -> bool:
    """Tell whether the rows of one forward pass weigh on each other."""
    return bool(hyper.get("granularity") == "batch")
