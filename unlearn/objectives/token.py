"""Objectives with one value per labelled token (nats); 0 where a token is not labelled."""

from jaxtyping import Float
from torch import Tensor

from unlearn.scores import Scores


def nll(policy: Scores) -> Float[Tensor, "batch seq"]:
    """How surprised the model is by each labelled token: -log p, in nats per token.

    As a retain term this is the plain language-modelling loss ("GD", "RT", "GDR" elsewhere).
    """
    return -policy.log_probs


def grad_ascent(policy: Scores) -> Float[Tensor, "batch seq"]:
    """Raise the loss of each labelled token: +log p, in nats per token.

    Unbounded below; the model collapses after an epoch or two on large forget sets.
    Source: TOFU (Maini et al. 2024, arXiv:2401.06121), "gradient ascent".
    """
    return policy.log_probs
