"""Objectives over whole next-token distributions: one value per position, in nats.

They read ``logits``: the only objectives for which ``[batch, seq, vocab]`` is allocated.
"""

import math

from jaxtyping import Float
from torch import Tensor

from unlearn.scores import Scores


def _kl(policy: Scores, reference: Scores) -> Float[Tensor, "batch seq"]:
    assert policy.logits is not None
    assert reference.logits is not None
    ours = policy.logits.log_softmax(-1)
    theirs = reference.logits.log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def kl(policy: Scores, reference: Scores) -> Float[Tensor, "batch seq"]:
    """How far the model has moved from the reference: KL(reference || policy) per real position.

    Prompt positions count, padding does not, so the value does not depend on padding (the published
    code averages over padding too; that is :func:`kl_all_positions`).
    Source: TOFU (Maini et al. 2024, arXiv:2401.06121), "KL minimisation".
    """
    return _kl(policy, reference) * policy.attended


def kl_labels(policy: Scores, reference: Scores) -> Float[Tensor, "batch seq"]:
    """KL(reference || policy) at the positions that predict a labelled token, in nats."""
    return _kl(policy, reference) * policy.mask


def kl_all_positions(policy: Scores, reference: Scores) -> Float[Tensor, "batch seq"]:
    """KL(reference || policy) at every position, padding included, as published code computes it.

    Here for parity with open-unlearning, TOFU and NPO code: the mean depends on how much padding a
    batch happens to have. Our padding is unmasked, so values at padded positions are our own.
    """
    return _kl(policy, reference)


def from_uniform(logits: Float[Tensor, "*positions vocab"]) -> Float[Tensor, "*positions"]:
    """Give KL(uniform || softmax(logits)) of each position, in nats."""
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


def uniform(policy: Scores) -> Float[Tensor, "batch seq"]:
    """How far the model is from knowing nothing: KL(uniform || policy) per real position, in nats.

    ``-log V - (1 / V) sum_v log p_v`` over a vocabulary of V tokens: 0 when all are as likely.
    Prompt positions count, padding does not (published code averages over padding too; that is
    :func:`uniform_all_positions`).
    Source: the assistant's loss on the retain set in ULD (Ji et al. 2024, arXiv:2406.08607, eq. 4).
    Deviation from its code: log-softmax in fp32, not the logarithm of a bfloat16 softmax.
    """
    assert policy.logits is not None
    return from_uniform(policy.logits) * policy.attended


def uniform_all_positions(policy: Scores) -> Float[Tensor, "batch seq"]:
    """KL(uniform || policy) at every position, padding included, as published code computes it.

    Here for parity: our padding is unmasked, so values at padded positions are our own.
    """
    assert policy.logits is not None
    return from_uniform(policy.logits)
