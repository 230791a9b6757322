"""What one row shows about a model, as pure functions; the benchmark averages over rows.

All of them read teacher-forced scores (the model sees the true answer up to each token), except
ROUGE, which reads what the model wrote by itself.
"""

import functools

import torch
from jaxtyping import Bool, Float
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from unlearn.scores import Scores


def probability(scores: Scores) -> Float[Tensor, " batch"]:
    """Give the probability of the answer per token: exp of the mean log-prob, EOS included.

    The geometric mean over the labelled tokens, in [0, 1]; NaN for a row without labelled tokens
    (Maini et al. 2024, arXiv:2401.06121, P(a|q)^(1/|a|)).
    """
    return (scores.sequence / scores.num_tokens).exp()


def extraction_strength(
    correct: Bool[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], *, drop_last: bool = True
) -> Float[Tensor, " batch"]:
    """Give the share of the answer that the model recites to its end once given what precedes.

    Counted in labelled tokens: the number of consecutive right predictions before the end, divided
    by the number of labelled tokens, in [0, 1] (Carlini et al. 2021, arXiv:2012.07805, as used by
    Wang et al. 2024, arXiv:2406.09179). ``drop_last`` leaves the last label (EOS) out of both.
    NaN when nothing is left. Deviation from open-unlearning, which gives 1/n instead of 0 to a row
    whose last prediction is wrong.
    """
    mask = _without_last(mask) if drop_last else mask
    position = torch.arange(mask.shape[1], device=mask.device)
    last_wrong = torch.where(mask & ~correct, position, -1).amax(-1, keepdim=True)
    return (mask & (position > last_wrong)).sum(-1) / mask.sum(-1)


def exact_memorization(
    correct: Bool[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], *, drop_last: bool = True
) -> Float[Tensor, " batch"]:
    """Give the share of labelled tokens that the model predicts right, in [0, 1].

    ``drop_last`` leaves the last label (EOS) out; NaN when nothing is left (Tirumala et al. 2022,
    arXiv:2205.10770).
    """
    mask = _without_last(mask) if drop_last else mask
    return (mask & correct).sum(-1) / mask.sum(-1)


def rouge_l_recall(target: str, generation: str) -> float:
    """Give the share of the target's words that the generation repeats in the same order.

    Length of the longest common subsequence of Porter-stemmed words divided by the number of the
    target's words, in [0, 1] (Lin 2004; the ``rouge_score`` package, as TOFU uses it).
    """
    return float(_rouge().score(target, generation)["rougeL"].recall)


@functools.cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def _without_last(mask: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Clear the last set position of every row."""
    remaining = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (remaining > 1)
