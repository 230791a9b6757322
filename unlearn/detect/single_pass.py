"""Membership scores that one forward pass gives, all of them pure: higher = more likely a member.

Each takes :class:`~unlearn.scores.Scores` with one row per text and gives one value per row. Rows
without a token score NaN. "The lowest share ``k``" of ``n`` tokens are the ``max(1, floor(k n))``
lowest; sources that take ``int(k n)`` alone give NaN for short texts.
"""

import zlib as deflate
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unlearn.errors import UserError
from unlearn.scores import Scores

K = 0.2
"""Share of the tokens that Min-K% and its kin look at."""
WINDOW = 3
"""Tokens averaged by Gap-K% before the lowest are taken."""
CLIP = 0.01
"""Most that one token may add to DC-PDD."""
SMALLEST_VARIANCE = 1e-6
"""A sure or a uniform distribution has variance 0 (nats squared); below this it counts as this."""
ROUNDING = 1e-9
"""Added before rounding down: 0.29 * 100 is 28.999... in floating point, and means 29."""


@dataclass(frozen=True)
class TokenFrequencies:
    """How frequent each token is in a reference corpus, smoothed: probabilities that sum to 1.

    ``known`` marks tokens that the corpus holds at all; the others have what smoothing gives them.
    """

    probabilities: Float[Tensor, " vocab"]
    known: Bool[Tensor, " vocab"]

    @cached_property
    def information(self) -> Float[Tensor, " vocab"]:
        """Give -log of the probabilities, in nats: much for a rare token."""
        return -self.probabilities.double().log()


def loss(scores: Scores, texts: Sequence[str] = ()) -> Float[Tensor, " batch"]:
    """Mean log-probability per token, in nats: minus the loss (Yeom et al. 2018, 1709.01604)."""
    total = scores.log_probs.double().sum(-1)
    return (total / scores.num_tokens).to(scores.log_probs.dtype)


def perplexity(scores: Scores) -> Float[Tensor, " batch"]:
    """Exp of minus :func:`loss`, for display: *lower* = more likely a member. Ranks as the loss."""
    return (-loss(scores)).exp()


def zlib_ratio(scores: Scores, texts: Sequence[str]) -> Float[Tensor, " batch"]:
    """Mean log-probability per token over the text's compressed size, in nats per byte.

    ``texts`` must be what was scored, after any cut. Compressed at zlib's default level; builds of
    zlib differ by a few bytes. Source: Carlini et al. 2021 (arXiv:2012.07805), zlib entropy.
    """
    sizes = [len(deflate.compress(text.encode("utf-8", "surrogatepass"))) for text in texts]
    return loss(scores) / scores.log_probs.new_tensor(sizes)


def min_k(scores: Scores, texts: Sequence[str] = (), *, k: float = K) -> Float[Tensor, " batch"]:
    """Mean log-probability of the least likely share ``k`` of the tokens (at least one), in nats.

    ``k = 1`` is :func:`loss`. Values of texts of different length are hard to compare.
    Source: Shi et al. 2024, Min-K% Prob, arXiv:2310.16789.
    """
    return lowest_mean(scores.log_probs, scores.mask, k)


def min_k_plus_plus(
    scores: Scores, texts: Sequence[str] = (), *, k: float = K
) -> Float[Tensor, " batch"]:
    """Mean of the lowest share ``k`` of standardised log-probabilities, without a unit.

    ``z = (log p - mean) / sqrt(variance)``, mean and variance over a token drawn from the model
    itself. Source: Zhang et al. 2024, Min-K%++, arXiv:2404.02936. Deviation: the variance is at
    least :data:`SMALLEST_VARIANCE` (their code divides by 0). Needs ``statistics``.
    """
    assert scores.mean is not None
    return lowest_mean((scores.log_probs - scores.mean) / _spread(scores), scores.mask, k)


def gap_k(
    scores: Scores, texts: Sequence[str] = (), *, k: float = K, window: int = WINDOW
) -> Float[Tensor, " batch"]:
    """Mean of the lowest share ``k`` of smoothed gaps to the likeliest token, without a unit.

    Gaps ``(log p - max log p) / sqrt(variance)`` are averaged over every ``window`` neighbouring
    tokens; ``k`` counts these averages. A text shorter than the window is not smoothed.
    Source: Gap-K%, code of meaoww/gap-k, whose variance is at least 1e-8. Needs ``statistics``.
    """
    assert scores.top is not None
    gaps = (scores.log_probs - scores.top) / _spread(scores)
    smooth, inside = _moving_mean(gaps, scores.mask, window)
    short = scores.num_tokens < window
    smooth[short], inside[short] = gaps[short], scores.mask[short]
    return lowest_mean(smooth, inside, k)


def dc_pdd(
    scores: Scores, frequencies: TokenFrequencies, *, clip: float = CLIP
) -> Float[Tensor, " batch"]:
    """Mean over the distinct tokens of ``min(p (-log f), clip)``, a calibrated cross-entropy: nats.

    ``p`` is the probability at a token's first occurrence among the scored ones, ``f`` its
    frequency in a reference corpus. Source: Zhang et al. 2024, DC-PDD, arXiv:2409.14781. Choose
    ``clip`` on other texts than those to be judged. Needs ``next_tokens``.

    Raises:
        UserError: the table knows fewer tokens than the texts hold.
    """
    assert scores.next_tokens is not None
    tokens = scores.next_tokens.masked_fill(~scores.mask, 0)
    if tokens.numel() and int(tokens.max()) >= len(frequencies.probabilities):
        raise UserError(
            f"the frequency table has {len(frequencies.probabilities)} tokens, the texts hold "
            f"token {int(tokens.max())}",
            "build the table with the tokenizer of this model",
        )
    first = first_occurrences(scores)
    weight = frequencies.information.to(scores.log_probs)[tokens]
    alpha = (scores.log_probs.exp() * weight).clamp_max(clip)
    return (alpha * first).sum(-1) / first.sum(-1)


def coverage(scores: Scores, frequencies: TokenFrequencies) -> Float[Tensor, " batch"]:
    """Share of a row's tokens that the reference corpus of a table holds, in [0, 1]."""
    assert scores.next_tokens is not None
    known = frequencies.known[scores.next_tokens.masked_fill(~scores.mask, 0)] & scores.mask
    return known.sum(-1) / scores.num_tokens


def first_occurrences(scores: Scores) -> Bool[Tensor, "batch seq"]:
    """Mark scored tokens whose id has not been scored earlier in the row."""
    assert scores.next_tokens is not None
    tokens = scores.next_tokens.masked_fill(~scores.mask, -1)
    order = tokens.argsort(dim=-1, stable=True)
    ordered = tokens.gather(-1, order)
    fresh = torch.ones_like(scores.mask)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(fresh).scatter(-1, order, fresh) & scores.mask


def polarized_distance(
    scores: Scores, *, high: float = 0.05, low: float = 0.3
) -> Float[Tensor, " batch"]:
    """Mean of the likeliest share ``high`` minus that of the least likely share ``low``, in nats.

    Source: Ye et al. 2024, PAC, arXiv:2405.11930 (ratios of their code).
    """
    top = -lowest_mean(-scores.log_probs, scores.mask, high)
    return top - lowest_mean(scores.log_probs, scores.mask, low)


def lowest_mean(
    values: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], k: float
) -> Float[Tensor, " batch"]:
    """Mean of each row's lowest share ``k`` of the marked values; NaN for a row with none.

    Summed in double precision, so that ``k = 1`` is the plain mean and padding changes nothing.
    """
    ordered = values.masked_fill(~mask, torch.inf).sort(-1).values.double()
    sizes = mask.sum(-1)
    counts = (sizes * k + ROUNDING).floor().clamp_min(1).minimum(sizes)
    chosen = torch.arange(values.shape[-1], device=values.device) < counts[:, None]
    return (ordered.masked_fill(~chosen, 0.0).sum(-1) / counts).to(values.dtype)


def _spread(scores: Scores) -> Float[Tensor, "batch seq"]:
    assert scores.variance is not None
    return scores.variance.clamp_min(SMALLEST_VARIANCE).sqrt()


def _moving_mean(
    values: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], window: int
) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Average each marked value with the ``window - 1`` after it; mark where all of them are.

    The marked values of a row must be its first ones.
    """
    smooth, inside = values.clone(), mask.clone()
    for step in range(1, window):
        smooth[:, :-step] += values[:, step:]
        inside[:, :-step] &= mask[:, step:]
        inside[:, -step:] = False
    return smooth / window, inside
