"""Was this text in the training data? Scores per text, higher = more likely a member.

Each detector is a pure function of :class:`~unlearn.scores.Scores` (and, for zlib, of the text).
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn.scores import Scores


def loss(scores: Scores, texts: Sequence[str]) -> Float[Tensor, " batch"]:
    """Mean log-probability per token, in nats: minus the loss (Yeom et al. 2018)."""
    return scores.sequence / scores.num_tokens


def zlib_ratio(scores: Scores, texts: Sequence[str]) -> Float[Tensor, " batch"]:
    """Mean log-probability per token over the text's compressed size in bytes.

    Source: Carlini et al. 2021 (arXiv:2012.07805), zlib entropy.
    """
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    return loss(scores, texts) / scores.log_probs.new_tensor(sizes)


def min_k(scores: Scores, texts: Sequence[str], *, k: float = 0.2) -> Float[Tensor, " batch"]:
    """Mean log-probability of the least likely share ``k`` of the tokens (at least one), in nats.

    Source: Shi et al. 2024, Min-K% Prob, arXiv:2310.16789.
    """
    rows = zip(scores.log_probs, scores.mask, strict=True)
    return torch.stack([_lowest(row[mask], k) for row, mask in rows])


def _lowest(log_probs: Float[Tensor, " token"], k: float) -> Float[Tensor, ""]:
    count = max(1, int(k * len(log_probs)))
    return log_probs.sort().values[:count].mean()


Detector = Callable[..., Tensor]

DETECTORS: dict[str, Detector] = {"loss": loss, "zlib": zlib_ratio, "min_k": min_k}
