"""How the logits of a base model and of an assistant become one distribution.

Pure functions of logits [*positions, vocab], in fp32 or fp64. A ``start`` parameter asks for the
assistant as it was before training. A ``writing`` parameter says that the function differs between
writing (the next token is about to be chosen) and scoring (given tokens are looked up). With a
``weight`` of 0 each gives the base's logits, bit for bit.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unlearn.signatures import hyperparameters

Logits = Float[Tensor, "*positions vocab"]


def subtract(
    base: Logits,
    assistant: Logits,
    *,
    weight: float = 0.75,
    top_filter: float = 0.01,
    writing: bool = False,
) -> Logits:
    """Take away what the assistant knows: ``base - weight * assistant`` among likely tokens.

    Tokens outside the base's :func:`likely` ones keep their base logit when scores are looked up,
    and get minus infinity while writing, so that none of them is ever chosen. ``top_filter`` 0
    keeps all.
    Source: Ji et al. 2024, ULD, arXiv:2406.08607, sections 3 and 4 (0.75 for TOFU, 0.5 for Harry
    Potter; filter 0.01). Deviations from the published code: unlikely tokens are really left out
    (there, scores were multiplied by the mask, and a dropped token with score 0 beat kept negative
    ones), and no least length of 15 tokens is forced upon answers.
    """
    if weight == 0:
        return base
    kept = likely(base, top_filter)
    combined = base - weight * assistant
    return combined.where(kept, -math.inf if writing else base)


def likely(base: Logits, rate: float) -> Bool[Tensor, "*positions vocab"]:
    """Mark the tokens that stay in play: those near the likeliest one, but never too few.

    A token stays when ``log p >= min(max log p + log rate, log p of the n-th likeliest)`` with
    ``n = floor(rate * vocab)``, at least 1: the relative filter of contrastive decoding (Li et al.
    2022, arXiv:2210.15097) with a least number of tokens, as in ULD. Ties stay.
    """
    if rate <= 0:
        return torch.ones_like(base, dtype=torch.bool)
    least = max(1, int(rate * base.shape[-1]))
    ranked = base.topk(least, dim=-1).values  # differences of logits are those of log p
    bound = (ranked[..., :1] + math.log(rate)).minimum(ranked[..., -1:])
    return base >= bound


def offset(base: Logits, assistant: Logits, start: Logits, *, weight: float = 1.0) -> Logits:
    """Add what the assistant has learned: ``base + weight * (assistant - start)``.

    Source: Huang et al. 2024, "Offset Unlearning for Large Language Models", arXiv:2404.11045.
    Deviation: the small model is the lower part of the base, not another model of its family.
    """
    return base if weight == 0 else base + weight * (assistant - start)


def suppress(base: Logits, assistant: Logits, *, weight: float = 1.0) -> Logits:
    """Lower what became likelier by over-fitting: ``base - weight * relu(assistant - base)``.

    Source: Eldan and Russinovich 2023, "Who's Harry Potter?", arXiv:2310.02238, its "generic"
    predictions; used as they are, as in MUSE (arXiv:2407.06460), without training a model on them.
    """
    return base if weight == 0 else base - weight * (assistant - base).relu()


RULES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (subtract, offset, suppress)
}
ALONE = ("subtract", "suppress")
"""Rules whose assistant is trained on its own logits; with the others on the combined ones."""


def asks(rule: str, parameter: str) -> bool:
    """Tell whether a rule takes ``start`` or ``writing``."""
    return parameter in inspect.signature(RULES[rule]).parameters


def settings(rule: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what a rule takes of the settings given, and fill in its defaults."""
    defaults = hyperparameters(RULES[rule])
    return {key: given.get(key, value) for key, value in defaults.items() if key != "writing"}
