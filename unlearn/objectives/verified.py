"""Objectives on answers that are known to be right, or known to be wrong: one value per answer.

A method on pairs is then a sum of two terms, one on each side, and the two sides of a pair need not
share a batch, a row or a rank. REDI (Reinforcement Distillation, arXiv:2505.24850, eq. 5) is
``answer_nll`` on the chosen answers and ``answer_ascent`` on the rejected ones with weight alpha:
cross-entropy with constant signed weights ``1 / |y_w|`` and ``-alpha / |y_l|`` per token.

``|y|`` counts the labelled tokens, that is the answer with its end token.
"""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from unlearn.scores import Scores

LONG = 256
"""Tokens above which a ratio of whole answers says nothing: it is 0 or 1 in every case."""
NEARLY_SURE = -1e-6
"""Largest log-probability of an answer that DCO is computed at."""
LINEAR = -30.0
"""Log-probability below which ``log(1 - (1 - p)^N)`` is ``log p + log N`` in any precision."""

PerSequence = Float[Tensor, " batch"]


def per_token(policy: Scores) -> PerSequence:
    """Give the mean log-probability of each answer's tokens, in nats; 0 for a row without any."""
    return policy.sequence / policy.num_tokens.clamp_min(1)


def answer_nll(policy: Scores, *, length_norm: bool = True) -> PerSequence:
    """How surprised the model is by a whole answer: ``-log p``, in nats, per answer.

    ``length_norm``: the mean over its tokens, so that every answer counts alike; else their sum.
    Not ``nll``, in which every token counts alike. Source: REDI, arXiv:2505.24850, eq. 5, first
    part; without ``length_norm`` the positive part of TOPR, arXiv:2503.14286, eq. 8.
    """
    return -(per_token(policy) if length_norm else policy.sequence)


def answer_ascent(
    policy: Scores, *, length_norm: bool = True, fade: NonNegativeFloat = 0.0
) -> PerSequence:
    """Make a wrong answer less likely: ``+log p``, in nats, per answer.

    ``length_norm`` as in :func:`answer_nll`. Unbounded below: watch it, and weigh it less than the
    right answers. ``fade`` weighs an answer by ``p^fade`` with p its mean token probability,
    without gradient, so that an answer already unlikely is pushed less; 0 weighs all alike.
    Source: REDI, arXiv:2505.24850, eq. 5, second part before alpha. ``fade`` is in its code alone,
    with a gradient through the weight that reverses the push once p is small; here it has none.
    """
    said = per_token(policy) if length_norm else policy.sequence
    if not fade:
        return said
    return (fade * per_token(policy).detach()).exp() * said


def topr(
    policy: Scores,
    reference: Scores,
    *,
    ratio: Literal["auto", "sequence", "geometric"] = "auto",
    length_norm: bool = False,
) -> PerSequence:
    """Make a wrong answer less likely, and stop once it is: ``c log p``, in nats, per answer.

    ``c = min(1, p / p_ref)`` without gradient: 1 at the start, towards 0 as the answer fades.
    ``ratio: sequence`` takes the probabilities of whole answers, ``geometric`` their means per
    token; ``auto`` is geometric for answers above 256 tokens, whose whole ratio is 0 or 1 after one
    step. A reward baseline b is the weights of the two terms: 1 - b on right answers, 1 + b on
    wrong ones.
    Source: Le Roux et al. 2025, "Tapered Off-Policy REINFORCE", arXiv:2503.14286, eq. 8. Deviation:
    the policy that wrote the data is not known, the frozen start stands for it; ``geometric`` and
    ``length_norm`` are ours.
    """
    gained = (policy.sequence - reference.sequence).detach()
    tokens = policy.num_tokens.clamp_min(1)
    if ratio == "geometric":
        gained = gained / tokens
    elif ratio == "auto":
        gained = torch.where(tokens > LONG, gained / tokens, gained)
    said = per_token(policy) if length_norm else policy.sequence
    return gained.clamp_max(0.0).exp() * said


def dco(policy: Scores, *, attempts: PositiveInt = 16) -> PerSequence:
    """Miss an answer in all of N attempts: ``-log(1 - (1 - p)^N)``, in nats, per answer.

    p is the probability of the whole answer, N ``attempts``. Its gradient is that of ``-log p``
    times ``N (1 - p)^(N - 1) p / (1 - (1 - p)^N)``: 1 for a small p, 0 once p is well above 1 / N,
    so the model is not made surer than N attempts ask for. N = 1 is ``answer_nll`` without its
    mean.
    For short answers only: of a long one p is so small that this is plain training.
    Source: Chen et al. 2025, "Rethinking Fine-Tuning when Scaling Test-Time Compute",
    arXiv:2502.07154 (direct coverage optimisation).
    """
    said = policy.sequence.clamp_max(NEARLY_SURE)
    small = said < LINEAR
    missed = attempts * torch.log1p(-said.masked_fill(small, LINEAR).exp())
    covered = torch.log(-torch.expm1(missed))
    return -torch.where(small, said + math.log(attempts), covered)


def error_norms(policy: Scores) -> Float[Tensor, "batch seq"]:
    """Give ``|| p - onehot(label) ||_2`` of each labelled token, in [0, sqrt 2]; 0 elsewhere.

    Above 1 only where the model is confident of something else than the label.
    """
    said = policy.distributions.detach().log_softmax(-1)
    squares = policy.laid_out((2.0 * said).exp().sum(-1))
    norms = squares - 2.0 * policy.log_probs.detach().exp() + 1.0
    return norms.clamp_min(0.0).sqrt() * policy.mask


def ent_nll(
    policy: Scores,
    *,
    threshold: Annotated[float, Field(gt=0, le=1.5)] = 1.3,
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    at_least: Annotated[float, Field(gt=0, le=1)] = 0.5,
) -> Float[Tensor, "batch seq"]:
    """Train on tokens except those the model is confident are wrong: nats per token.

    ``nll`` without the tokens whose error norm is above ``threshold``; with ``fraction`` those with
    the largest norms are left out instead, that share of each answer, rounded down. At least the
    share ``at_least`` of an answer stays, those with the smallest norms. The tokens that stay stand
    for the whole answer: their losses are scaled to its length, so that an answer counts as before.
    Source: Li et al. 2023, "Error Norm Truncation", arXiv:2310.00840. Deviations: the share is of
    an answer, not of a batch, so that no batch size changes it; the threshold is ours, the paper
    tunes it; begin with a trained model (``first``), as the paper begins after some steps.
    """
    norms, tokens = error_norms(policy), policy.num_tokens[:, None]
    above = (norms > threshold).sum(-1, keepdim=True)
    dropped = (fraction * tokens).floor() if fraction else above
    dropped = torch.minimum(dropped, tokens - (at_least * tokens).ceil())
    order = norms.masked_fill(~policy.mask, -1.0).argsort(dim=-1, descending=True, stable=True)
    kept = policy.mask & (order.argsort(dim=-1) >= dropped)
    scale = tokens / kept.sum(-1, keepdim=True).clamp_min(1)
    return -policy.log_probs * kept * scale
