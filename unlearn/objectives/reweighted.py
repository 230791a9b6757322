"""Gradient ascent in which tokens count by a weight; thin, the weights are in ``weighting``.

One value per labelled token, in nats, 0 elsewhere (one per sequence for the granularities
``instance`` and ``batch``). No gradient goes through a weight.
"""

from typing import Annotated

from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from unlearn.objectives.weighting import (
    Granularity,
    Sampling,
    Weigh,
    annotated,
    both,
    chosen,
    granular,
    saturation,
    two_valued,
)
from unlearn.scores import Scores

PerToken = Float[Tensor, "batch seq"]
PerGranule = Float[Tensor, "batch seq"] | Float[Tensor, " batch"]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
EPSILON = 1e-5
"""Keeps TNPO's weight defined where both probabilities vanish, as in the published code."""


def wga(policy: Scores, *, beta: NonNegativeFloat = 1.0) -> PerToken:
    """Raise the loss of tokens that are still known: ``p^beta log p``, in nats per token.

    A token that is already unlikely weighs next to nothing, so the ascent cannot run away.
    ``beta`` 0 is gradient ascent.
    Source: weighted gradient ascent, Wang et al. 2025 (G-effect), arXiv:2502.19301. ``beta`` is 1
    in the paper and in open-unlearning; the paper's code falls back to 5.
    """
    return saturation(policy.log_probs.detach(), beta) * policy.log_probs


def tnpo(policy: Scores, reference: Scores, *, beta: NonNegativeFloat = 4.0) -> PerToken:
    """NPO's weight for each token alone: ``2 p^beta / (p^beta + ref^beta) log p``, per token.

    Source: token-wise NPO, Wang et al. 2025 (G-effect), arXiv:2502.19301; the published code adds
    1e-5 to the denominator, and so do we.
    """
    return _npo_weight(policy, reference, beta, beta) * policy.log_probs


def wtnpo(
    policy: Scores,
    reference: Scores,
    *,
    beta: NonNegativeFloat = 4.0,
    extra: NonNegativeFloat = 1.5,
) -> PerToken:
    """TNPO that spends less on unlikely tokens: ``2 p^(beta + extra) / (p^beta + ref^beta) log p``.

    In nats per token. ``extra`` 0 is :func:`tnpo`.
    Source: weighted token-wise NPO, Wang et al. 2025 (G-effect), arXiv:2502.19301 (``alpha`` there,
    which means the retain weight here).
    """
    return _npo_weight(policy, reference, beta, beta + extra) * policy.log_probs


def _npo_weight(policy: Scores, reference: Scores, beta: float, power: float) -> PerToken:
    ours, theirs = policy.log_probs.detach(), reference.log_probs.detach()
    known = saturation(ours, beta) + saturation(theirs, beta) + EPSILON
    return 2.0 * saturation(ours, power) / known


def satimp(
    policy: Scores,
    *,
    beta1: NonNegativeFloat = 5.0,
    beta2: NonNegativeFloat = 0.1,
    granularity: Granularity = "token",
    group_size: PositiveInt = 5,
) -> PerGranule:
    """Raise the loss of tokens that are known and yet informative: ``p^beta1 (1 - p)^beta2 log p``.

    In nats; ``granularity`` says what is weighed, see ``granular`` in ``weighting.py``. ``token``
    and ``group`` are averaged over tokens; ``instance`` and ``batch`` weigh the summed
    log-probability of an answer and are averaged over answers.
    Source: SatImp, Yang et al. 2025, arXiv:2505.11953. ``beta1`` 5 and ``beta2`` 0.1 are what its
    authors recommend; open-unlearning sets ``beta2`` to 1. ``group_size`` 5 is ours.
    """
    return _ascend(policy, both(beta1, beta2), granularity, group_size)


def simsat(
    policy: Scores,
    *,
    beta: NonNegativeFloat = 1.0,
    granularity: Granularity = "token",
    group_size: PositiveInt = 5,
) -> PerGranule:
    """Raise the loss of what is still known: weight ``p^beta``; the saturation half of SatImp.

    Per token it is :func:`wga`. Units and granularities as in :func:`satimp`.
    Source: SimSat, Yang et al. 2025, arXiv:2505.11953. Deviation: the published branch without a
    retain term drops the exponent; here it always counts.
    """
    return _ascend(policy, both(beta, 0.0), granularity, group_size)


def simimp(
    policy: Scores,
    *,
    beta: NonNegativeFloat = 1.0,
    granularity: Granularity = "token",
    group_size: PositiveInt = 5,
) -> PerGranule:
    """Raise the loss of what is hard to predict: weight ``(1 - p)^beta``; SatImp's other half.

    Units and granularities as in :func:`satimp`. For whole answers the weight is near 1, as a long
    answer is never probable. Source: SimImp, Yang et al. 2025, arXiv:2505.11953.
    """
    return _ascend(policy, both(0.0, beta), granularity, group_size)


def _ascend(policy: Scores, weigh: Weigh, granularity: Granularity, group_size: int) -> PerGranule:
    weights = granular(policy, weigh, granularity, group_size)
    return weights * (policy.log_probs if weights.dim() == 2 else policy.sequence)


def ga_sampled(
    policy: Scores,
    *,
    sampling: Sampling = "topk",
    fraction: Fraction = 0.15,
    soft: Share = 1.0,
    beta1: NonNegativeFloat = 0.0,
    beta2: NonNegativeFloat = 0.0,
    sample_seed: NonNegativeInt = 0,
) -> PerToken:
    """Raise the loss of a chosen share of each answer's tokens: ``w log p``, in nats per token.

    ``w`` is ``soft`` for chosen tokens and ``1 - soft`` for the others; ``sampling`` says which are
    chosen, see :func:`~unlearn.objectives.weighting.chosen`. Exponents above 0 weigh the tokens as
    in :func:`satimp` on top.
    Source: "hard sampling" of SatImp, Yang et al. 2025, arXiv:2505.11953 (``topk`` with 0.15,
    ``bottomk`` with 0.5). Deviations: a mean over labelled tokens, not a sum over the batch; an
    answer ends where it ends, not at position 499; a ``soft`` between 0 and 1 works (there it was
    cut to the integer 0) and holds for all three; ``fraction`` is the chosen share for ``bottomk``
    too, where the published parameter is the share left out.
    """
    weights = two_valued(chosen(policy, sampling, fraction, sample_seed), soft, policy)
    return weights * both(beta1, beta2)(policy.log_probs.detach()) * policy.log_probs


def ga_annotated(policy: Scores, *, important_weight: Share = 1.0) -> PerToken:
    """Raise the loss of annotated tokens: ``w log p``, in nats per token.

    ``w`` is ``important_weight`` for tokens that the column ``important`` names and
    ``1 - important_weight`` for the others (``beta`` and ``1 - beta`` in the source).
    Source: annotated importance, Yang et al. 2025, arXiv:2505.11953.
    """
    return annotated(policy, important_weight) * policy.log_probs
