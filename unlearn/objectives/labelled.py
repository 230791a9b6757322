"""Objectives over the distributions at labelled positions; one value per token, 0 elsewhere.

Only these positions reach the vocabulary head: ``[label, vocab]`` is allocated, not
``[batch, seq, vocab]``.
"""

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from unlearn.objectives.distribution import from_uniform
from unlearn.scores import IGNORE, Scores

PerToken = Float[Tensor, "batch seq"]
LabelledLogits = Float[Tensor, "label vocab"]


def undial(policy: Scores, reference: Scores, *, beta: NonNegativeFloat = 10.0) -> PerToken:
    """Distil the frozen start with each true token's logit lowered by ``beta``: nats per token.

    The cross-entropy of the model to ``softmax(z_ref - beta * onehot(token))``.
    Source: UNDIAL, Dong et al. 2024, arXiv:2402.10052. Deviation: labelled positions only; for the
    whole input, as in the paper, see :func:`undial_all_positions`. (open-unlearning has no mask and
    lowers the logit of an arbitrary token at prompt and padding positions.)
    """
    targets = _targets(policy)
    return policy.laid_out(_distil(policy.distributions, reference.distributions, targets, beta))


def undial_all_positions(
    policy: Scores, reference: Scores, *, beta: NonNegativeFloat = 10.0
) -> PerToken:
    """UNDIAL over the whole input, prompt included: nats per position that has a next token.

    Padding does not count. Reads whole logits. Source: Dong et al. 2024, arXiv:2402.10052.
    """
    assert policy.next_tokens is not None
    assert policy.logits is not None
    assert reference.logits is not None
    real = _has_next(policy)
    targets = policy.next_tokens[real]
    values = _distil(policy.logits[real], reference.logits[real], targets, beta)
    return values.new_zeros(real.shape).masked_scatter(real, values)


def _distil(ours: Tensor, theirs: Tensor, targets: Tensor, beta: float) -> Float[Tensor, " label"]:
    known = (targets != IGNORE)[:, None]  # given labels alone, a prompt token is not known
    lowered = torch.where(known, -beta, 0.0).to(theirs)
    teacher = theirs.scatter_add(-1, targets.clamp_min(0)[:, None], lowered).softmax(-1)
    return ours.logsumexp(-1) - (teacher * ours).sum(-1)


def _has_next(policy: Scores) -> Tensor:
    ahead = policy.attended.roll(-1, 1) & policy.attended
    ahead[:, -1] = False
    return ahead


def ceu(policy: Scores, *, ignore_first_n_answer_tokens: NonNegativeInt = 1) -> PerToken:
    """Match the model's own distribution without the true token: nats per token that counts.

    The cross-entropy of the model to itself with the true token's logit at minus infinity (no
    gradient through that target). The gradient of the true token's logit is its probability, so it
    fades as the token is forgotten. The first labelled tokens of a row do not count.
    Source: CE-U, Yang 2025, arXiv:2503.01224.
    """
    logits, targets = policy.distributions, _targets(policy)
    others = logits.detach().scatter(-1, targets[:, None], -torch.inf)
    # a cross-entropy to a target with a zero: written so that no infinity meets it
    losses = logits.logsumexp(-1) - (others.softmax(-1) * logits).sum(-1)
    late = policy.mask.cumsum(-1) > ignore_first_n_answer_tokens
    return policy.laid_out(losses) * late


def max_entropy(policy: Scores) -> PerToken:
    """How far each prediction is from a uniform guess: KL(uniform || policy), in nats per token.

    Equals ``logsumexp(z) - mean(z) - ln V``; 0 when all tokens are equally likely.
    Source: ME of Yuan et al. 2024, "A Closer Look at Machine Unlearning", arXiv:2410.08109.
    """
    return policy.laid_out(from_uniform(policy.distributions))


def pdu(policy: Scores) -> PerToken:
    """Flatten predictions: the squared distance from the highest to the mean logit, per token.

    In squared logits; 0 where all logits are equal. The forget term of PDU.
    Source: Entesari et al. 2025, "Constrained Entropic Unlearning", arXiv:2506.05314. Deviation
    from open-unlearning: the positions that predict a label count, not those that hold it.
    """
    logits = policy.distributions
    return policy.laid_out((logits.amax(-1) - logits.mean(-1)).square())


def _targets(policy: Scores) -> Tensor:
    assert policy.next_tokens is not None
    return policy.next_tokens[policy.mask]
