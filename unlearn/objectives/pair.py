"""Objectives on two answers to one question: one value per pair.

``chosen`` is the answer that is to become likelier than ``rejected``. Log-probabilities are summed
over the labelled tokens of an answer.
"""

from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

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
