"""What one row shows about a model, as pure functions; the benchmark averages over rows.

All of them read teacher-forced scores (the model sees the true answer up to each token), except
ROUGE, which reads what the model wrote by itself.
"""

import functools
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from torch import Tensor

from unlearn.scores import Scores

EsVariant = Literal["exact", "ou", "satimp"]


class Rouge(NamedTuple):
    """Overlap of words, each in [0, 1]."""

    rouge1_recall: float
    rouge_l_recall: float
    rouge_l_f1: float


def probability(scores: Scores) -> Float[Tensor, " batch"]:
    """Give the probability of the answer per token: exp of the mean log-prob, EOS included.

    The geometric mean over the labelled tokens, in [0, 1]; NaN for a row without labelled tokens
    (Maini et al. 2024, arXiv:2401.06121, P(a|q)^(1/|a|)).
    """
    return (scores.sequence / scores.num_tokens).exp()


def normalised_probability(
    correct: Float[Tensor, " batch"],
    wrong: Float[Tensor, "batch option"],
    *,
    epsilon: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Give the right answer's share of the probability of all options, in [0, 1].

    Each option's probability is per token (:func:`probability`); NaN where all are 0. TOFU's
    measure on real authors and world facts (Maini et al. 2024); ``epsilon``: open-unlearning's
    1e-10 in the denominator.
    """
    return correct / (correct + wrong.sum(-1) + epsilon)


def extraction_strength(
    correct: Bool[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    drop_last: bool = True,
    variant: EsVariant = "exact",
) -> Float[Tensor, " batch"]:
    """Give the share of the answer that the model recites to its end once given what precedes.

    Counted in labelled tokens: the number of consecutive right predictions before the end, divided
    by the number of labelled tokens, in [0, 1] (Carlini et al. 2021, arXiv:2012.07805, as used by
    Wang et al. 2024, arXiv:2406.09179). ``drop_last`` leaves the last label (EOS) out of both.
    ``exact`` gives NaN when nothing is left. ``ou`` is open-unlearning's: 1/n, not 0, where the
    last prediction is wrong, and 0 when nothing is left. ``satimp`` always counts the last label
    (SatImp, arXiv:2505.11953, whose texts end without EOS).
    """
    mask = without_last(mask) if drop_last and variant != "satimp" else mask
    position = torch.arange(mask.shape[1], device=mask.device)
    last_wrong = torch.where(mask & ~correct, position, -1).amax(-1, keepdim=True)
    run, size = (mask & (position > last_wrong)).sum(-1), mask.sum(-1)
    if variant == "ou":
        return run.clamp_min(1).minimum(size) / size.clamp_min(1)
    return run / size


def exact_memorization(
    correct: Bool[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], *, drop_last: bool = True
) -> Float[Tensor, " batch"]:
    """Give the share of labelled tokens that the model predicts right, in [0, 1].

    ``drop_last`` leaves the last label (EOS) out; NaN when nothing is left (Tirumala et al. 2022,
    arXiv:2205.10770).
    """
    mask = without_last(mask) if drop_last else mask
    return (mask & correct).sum(-1) / mask.sum(-1)


def rouge(target: str, generation: str) -> Rouge:
    """Compare Porter-stemmed words with the target's: shared ones, and the longest common sequence.

    Recall is the share of the target's words, F1 the harmonic mean with the share of the
    generation's (Lin 2004; the ``rouge_score`` package, as TOFU and open-unlearning use it).
    """
    found = _rouge().score(target, generation)
    longest = found["rougeL"]
    return Rouge(float(found["rouge1"].recall), float(longest.recall), float(longest.fmeasure))


def rouge_l_recall(target: str, generation: str) -> float:
    """Give the share of the target's words that the generation repeats in the same order, [0, 1].

    Length of the longest common subsequence of words; see :func:`rouge`.
    """
    return rouge(target, generation).rouge_l_recall


class _Words:
    """The package's tokenizer, remembering texts: one answer is compared with several others."""

    def __init__(self) -> None:
        self.tokenize = functools.lru_cache(4096)(DefaultTokenizer(use_stemmer=True).tokenize)


@functools.cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rouge1", "rougeL"], tokenizer=_Words())


def without_last(mask: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Clear the last set position of every row: an answer's EOS."""
    remaining = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (remaining > 1)
