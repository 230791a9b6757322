"""Objectives with one value per sequence; log-probabilities are summed over its labelled tokens."""

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from unlearn.scores import Scores


def npo(policy: Scores, reference: Scores, *, beta: PositiveFloat = 0.1) -> Float[Tensor, " batch"]:
    """Push a sequence's probability below the reference's, ever more gently: per sequence.

    ``-(2 / beta) * log sigmoid(-beta * log(p / p_ref))`` with p the probability of the whole answer
    (sums over tokens, no length normalisation). Equals ``(2 / beta) * ln 2`` at the start; its
    gradient is gradient ascent weighted by ``2 p^beta / (p^beta + p_ref^beta)``.
    Source: Zhang et al. 2024, "Negative Preference Optimization", arXiv:2404.05868, eq. 3.
    """
    log_ratio = policy.sequence - reference.sequence
    return -2.0 / beta * logsigmoid(-beta * log_ratio)
