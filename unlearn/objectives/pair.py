"""Objectives on two answers to one question: one value per pair.

``chosen`` is the answer that is to become likelier than ``rejected``. Log-probabilities are summed
over the labelled tokens of an answer, unless an objective says that it takes their mean.
"""

from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from unlearn.objectives.verified import per_token
from unlearn.scores import Scores


def dpo(
    chosen: Scores,
    rejected: Scores,
    chosen_reference: Scores,
    rejected_reference: Scores,
    *,
    beta: PositiveFloat = 0.1,
) -> Float[Tensor, " batch"]:
    """Prefer one answer to another by more than the reference does: per pair.

    ``-(2 / beta) * log sigmoid(beta * (log(c / c_ref) - log(r / r_ref)))`` with c and r the
    probabilities of the whole answers (sums over tokens, no length normalisation). Equals
    ``(2 / beta) * ln 2`` at the start.
    Source: Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, eq. 7; with a
    refusal as the chosen answer, TOFU (Maini et al. 2024, arXiv:2401.06121). Deviation: the factor
    ``2 / beta``, as in open-unlearning, so that its scale is that of NPO.
    """
    gained = chosen.sequence - chosen_reference.sequence
    lost = rejected.sequence - rejected_reference.sequence
    return -2.0 / beta * logsigmoid(beta * (gained - lost))


def ap(chosen: Scores, rejected: Scores, *, beta: PositiveFloat = 0.1) -> Float[Tensor, " batch"]:
    """Keep one answer likelier than another, without a reference: per pair.

    ``-(1 / beta) * log sigmoid(beta * (log c - log r))`` with c and r the probabilities of the
    whole answers: the true answer to a retain question, and a refusal of it. Near 0 where the true
    answer is far likelier; about log(r / c) where the refusal is.
    Source: Yuan et al. 2024, "A Closer Look at Machine Unlearning for Large Language Models",
    arXiv:2410.08109 (answer preservation).
    """
    return -1.0 / beta * logsigmoid(beta * (chosen.sequence - rejected.sequence))


def preference(
    chosen: Scores,
    rejected: Scores,
    chosen_reference: Scores,
    rejected_reference: Scores,
    *,
    beta: PositiveFloat = 0.1,
    length_norm: bool = False,
) -> Float[Tensor, " batch"]:
    """Prefer one answer to another, as DPO is published for post-training: per pair.

    ``-log sigmoid(beta * (log(c / c_ref) - log(r / r_ref)))``; ln 2 at the start. It is ``dpo``
    without that one's factor ``2 / beta``. ``length_norm`` takes means over an answer's tokens
    instead of sums; ``beta`` is then some fifty times larger.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (TRL's ``sigmoid``); ``length_norm`` as in
    TRL's ``sigmoid_norm`` and in delta learning, arXiv:2507.06187.
    """
    gained = _said(chosen, length_norm) - _said(chosen_reference, length_norm)
    lost = _said(rejected, length_norm) - _said(rejected_reference, length_norm)
    return -logsigmoid(beta * (gained - lost))


def _said(scores: Scores, length_norm: bool) -> Float[Tensor, " batch"]:
    return per_token(scores) if length_norm else scores.sequence


def simpo(
    chosen: Scores, rejected: Scores, *, beta: PositiveFloat = 2.0, gamma: NonNegativeFloat = 1.0
) -> Float[Tensor, " batch"]:
    """Prefer one answer to another by a margin, without a reference: per pair.

    ``-log sigmoid(beta * (c - r) - gamma)`` with c and r the mean log-probabilities per token.
    Source: Meng et al. 2024, "SimPO", arXiv:2405.14734; ``beta`` and ``gamma`` as tuned in
    arXiv:2505.24850.
    """
    return -logsigmoid(beta * (per_token(chosen) - per_token(rejected)) - gamma)
