"""Membership inference: can the forget set be told from text the model never saw?

Scores per sequence, **higher = less member-like**, as open-unlearning has them; the detectors of
:mod:`unlearn.detect` are the same formulas with the opposite sign (higher = more familiar). Labels
are 0 for the forget set and 1 for the holdout set, so an AUC of 1 says that the forget set looks
like training data, 0.5 that the two cannot be told apart, below 0.5 that the forget set looks less
familiar than text the model never saw. All but the gradient norm are pure functions of
:class:`~unlearn.scores.Scores`. A row without tokens has the score NaN (open-unlearning: 0, which
skews the AUC); leave such rows out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from unlearn import detect
from unlearn.detect.roc import auc
from unlearn.evals.metrics import without_last
from unlearn.scores import Scorer, Scores

__all__ = ["ATTACKS", "auc", "gradnorm", "privleak", "reference", "s_mia"]

K = 0.4
"""Share of the tokens that Min-K% looks at on TOFU and MUSE."""
EPSILON = 1e-10


def loss(scores: Scores, texts: Sequence[str]) -> Float[Tensor, " batch"]:
    """Give the mean negative log-probability per labelled token, EOS included, in nats.

    Source: Yeom et al. 2018, arXiv:1709.01604.
    """
    return -detect.loss(scores, texts)


def zlib_ratio(scores: Scores, texts: Sequence[str]) -> Float[Tensor, " batch"]:
    """Give the loss over the answer's compressed size in bytes (nats per byte).

    Source: Carlini et al. 2021, arXiv:2012.07805. ``texts`` are the answers as the dataset has
    them; open-unlearning decodes them from the labels, which may differ in whitespace.
    """
    return -detect.zlib_ratio(scores, texts)


def min_k(scores: Scores, texts: Sequence[str], *, k: float = K) -> Float[Tensor, " batch"]:
    """Give minus the mean log-probability of the least likely share ``k`` of the tokens, in nats.

    The last label (EOS) is left out; of n tokens max(1, int(k n)) count (Shi et al. 2024,
    arXiv:2310.16789).
    """
    return -detect.min_k(_without_end(scores), texts, k=k)


def min_k_plus_plus(
    scores: Scores, texts: Sequence[str], *, k: float = K
) -> Float[Tensor, " batch"]:
    """Give Min-K% of log-probabilities standardised by the vocabulary's, without a unit.

    z = (log p - mean) / sqrt(variance), both over a token drawn from the model itself, the variance
    at least 1e-6; the last label (EOS) is left out (Zhang et al. 2024, arXiv:2404.02936). Needs
    ``mean`` and ``variance``.
    """
    return -detect.min_k_plus_plus(_without_end(scores), texts, k=k)


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "loss": loss,
    "zlib": zlib_ratio,
    "min_k": min_k,
    "min_k_plus_plus": min_k_plus_plus,
}
"""Attacks that need nothing but one pass over the model, by the name after ``mia_``."""


def reference(losses: ArrayLike, reference_losses: ArrayLike) -> np.ndarray:
    """Give the loss minus that of a reference model that never saw the forget set, in nats.

    Source: Carlini et al. 2021, arXiv:2012.07805 (there as a ratio); the retain model serves.
    """
    return np.asarray(losses, float) - np.asarray(reference_losses, float)


def gradnorm(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    p: Literal[1, 2] | float = 2,
) -> list[float]:
    """Give the mean over parameter tensors of the p-norm of the loss's gradient, per one-row batch.

    The loss is the mean over labelled tokens without the last one (Maini et al. 2024,
    arXiv:2402.17012, as in open-unlearning). Costs a forward and a backward pass per row. The model
    is in evaluation mode and its gradients are left as they were (open-unlearning uses training
    mode, so dropout adds noise, and leaves the last row's gradients behind). Frozen tensors, as
    those of a quantised base, are left out.
    """
    tensors = [tensor for tensor in model.parameters() if tensor.requires_grad]
    modes = {module: module.training for module in model.modules()}
    scorer = Scorer.for_model(model.eval())
    found = []
    try:
        for batch in batches:
            scores = _without_end(scorer(model, batch))
            mean = -(scores.sequence / scores.num_tokens).sum()
            gradients = torch.autograd.grad(mean, tensors, allow_unused=True)
            norms = [g.float().norm(p=p) for g in gradients if g is not None]
            found.append(float(torch.stack(norms).mean()))
    finally:
        for module, training in modes.items():
            module.training = training
    return found


def privleak(auc: float, auc_retain: float = 0.5) -> float:
    """Give how far the attack's AUC is from the retain model's, in percent.

    Negative: under-unlearned, the forget set still looks like training data (-100: perfectly so);
    0: as the retain model; positive: over-unlearned (Shi et al. 2024, MUSE, arXiv:2407.06460, who
    count the AUC the other way round; computed with Min-40%).
    """
    ours, theirs = 1 - auc, 1 - auc_retain
    return (ours - theirs) / (theirs + EPSILON) * 100


def s_mia(auc: float, auc_retain: float) -> float:
    """Give 1 - |AUC - AUC of the retain model| / AUC of the retain model, clipped to [0, 1].

    1: the attack sees what it sees in the retain model (OpenUnlearning, arXiv:2506.12618). Where
    the retain model's AUC is 0, 1 if ours is too, else 0.
    """
    if auc_retain == 0:
        return float(auc == 0)
    return min(1.0, max(0.0, 1 - abs(auc - auc_retain) / auc_retain))


def _without_end(scores: Scores) -> Scores:
    mask = without_last(scores.mask)
    return replace(scores, mask=mask, log_probs=scores.log_probs * mask)
