"""Objectives with one value per sequence; log-probabilities are summed over its labelled tokens."""

from typing import Annotated

from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from unlearn.objectives.weighting import Sampling, annotated, chosen, two_valued
from unlearn.scores import Scores

PerSequence = Float[Tensor, " batch"]


def npo(
    policy: Scores, reference: Scores, *, beta: PositiveFloat = 0.1, length_norm: bool = False
) -> Float[Tensor, " batch"]:
    """Push a sequence's probability below the reference's, ever more gently: per sequence.

    ``-(2 / beta) * log sigmoid(-beta * log(p / p_ref))`` with p the probability of the whole answer
    (sums over tokens). Equals ``(2 / beta) * ln 2`` at the start; its gradient is gradient ascent
    weighted by ``2 p^beta / (p^beta + p_ref^beta)``.
    ``length_norm`` takes the mean log-ratio per token instead, for long texts whose summed ratio
    leaves no gradient; ``beta`` then means something else.
    Source: Zhang et al. 2024, "Negative Preference Optimization", arXiv:2404.05868, eq. 3;
    ``length_norm`` is ours.
    """
    log_ratio = policy.sequence - reference.sequence
    if length_norm:
        log_ratio = log_ratio / policy.num_tokens.clamp_min(1)
    return _pushed_down(log_ratio, beta)


def npo_sampled(
    policy: Scores,
    reference: Scores,
    *,
    beta: PositiveFloat = 0.1,
    sampling: Sampling = "topk",
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15,
    soft: Annotated[float, Field(ge=0, le=1)] = 1.0,
    sample_seed: NonNegativeInt = 0,
) -> PerSequence:
    """NPO on a chosen share of each answer's tokens, the same for model and reference.

    Per sequence; tokens are chosen and weighed as in
    :func:`~unlearn.objectives.reweighted.ga_sampled`, by the model's losses.
    Source: Yang et al. 2025 (SatImp), arXiv:2505.11953, ``npo_topk`` and its like.
    """
    weights = two_valued(chosen(policy, sampling, fraction, sample_seed), soft, policy)
    return _weighted_npo(policy, reference, weights, beta)


def npo_annotated(
    policy: Scores,
    reference: Scores,
    *,
    beta: PositiveFloat = 0.1,
    important_weight: Annotated[float, Field(ge=0, le=1)] = 1.0,
) -> PerSequence:
    """NPO on annotated tokens; weights as in :func:`~unlearn.objectives.reweighted.ga_annotated`.

    Per sequence. Source: Yang et al. 2025 (SatImp), arXiv:2505.11953.
    """
    return _weighted_npo(policy, reference, annotated(policy, important_weight), beta)


def simnpo(policy: Scores, *, beta: PositiveFloat = 4.5, delta: float = 0.0) -> PerSequence:
    """Push a sequence's mean token probability down, without a reference: per sequence.

    ``-(2 / beta) * log sigmoid(beta * (loss - delta))`` with ``loss`` the mean negative
    log-probability of its labelled tokens, in nats. ``delta`` is named as in open-unlearning (gamma
    in the paper). Source: Fan et al. 2024, "Simplicity Prevails", arXiv:2410.07163.
    """
    loss = -policy.sequence / policy.num_tokens.clamp_min(1)  # a row that fills up has no token
    return _pushed_down(delta - loss, beta)


def _weighted_npo(
    policy: Scores, reference: Scores, weights: Float[Tensor, "batch seq"], beta: float
) -> PerSequence:
    log_ratio = (weights * (policy.log_probs - reference.log_probs)).sum(-1)
    return _pushed_down(log_ratio, beta)


def _pushed_down(log_ratio: PerSequence, beta: float) -> PerSequence:
    return -2.0 / beta * logsigmoid(-beta * log_ratio)
