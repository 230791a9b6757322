"""Was this text in the training data? Scores per text, higher = more likely a member.

:mod:`~unlearn.detect.single_pass` holds the scores that one forward pass gives, as pure functions
of :class:`~unlearn.scores.Scores`; :mod:`~unlearn.detect.several_passes` those that compare passes.
"""

from collections.abc import Callable

from torch import Tensor

from unlearn.detect.single_pass import (
    TokenFrequencies,
    coverage,
    dc_pdd,
    gap_k,
    loss,
    min_k,
    min_k_plus_plus,
    perplexity,
    zlib_ratio,
)

__all__ = [
    "DETECTORS",
    "TokenFrequencies",
    "coverage",
    "dc_pdd",
    "gap_k",
    "loss",
    "min_k",
    "min_k_plus_plus",
    "perplexity",
    "zlib_ratio",
]

Detector = Callable[..., Tensor]

DETECTORS: dict[str, Detector] = {
    "loss": loss,
    "zlib": zlib_ratio,
    "mink": min_k,
    "minkpp": min_k_plus_plus,
    "gapk": gap_k,
}
"""Scores of one pass that need nothing but the model and the text: ``(scores, texts)``."""
