"""Where chosen latents fire on the forget set, and how strongly: what a person judges them by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from unlearn.ranks import Ranks
from unlearn.sae.clamp import Clamp
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.selection import Progress, Rows, activations

BEFORE, AFTER = 12, 6
"""Tokens of context that are shown before and after one."""
PERCENTILE = 99.0
"""What a relative strength is a multiple of: this percentile of the activations above 0."""


@dataclass(frozen=True)
class Firings:
    """Every activation above 0 of some latents: whose, where, how strong; strongest first."""

    features: tuple[int, ...]
    feature: Int[np.ndarray, " firing"]
    row: Int[np.ndarray, " firing"]
    position: Int[np.ndarray, " firing"]
    value: Float[np.ndarray, " firing"]

    def mean(self, feature: int) -> float | None:
        """Give the mean activation above 0; None when there is none."""
        values = self.value[self.feature == feature]
        return float(values.mean()) if len(values) else None

    def percentile(self, features: Sequence[int]) -> float | None:
        """Give the 99th percentile of the activations above 0 of these latents together."""
        values = self.value[np.isin(self.feature, list(features))]
        return float(np.percentile(values, PERCENTILE)) if len(values) else None

    def strongest(self, feature: int, number: int) -> list[tuple[int, int, float]]:
        """Give row, position and value of the strongest firings, one of each row."""
        found: dict[int, tuple[int, int, float]] = {}
        for at in np.flatnonzero(self.feature == feature):
            row = int(self.row[at])
            found.setdefault(row, (row, int(self.position[at]), float(self.value[at])))
            if len(found) == number:
                break
        return list(found.values())


@torch.no_grad()
def firings(
    model: Any,
    dictionary: Dictionary,
    features: Sequence[int],
    layer: int,
    rows: Rows,
    *,
    progress: Progress = lambda done, total: None,
) -> Firings:
    """Find every token of some rows that the latents fire on.

    With several processes every one must call this alike; they share the rows.
    """
    clamp = Clamp.of(dictionary, features, layer=layer, mode="zero")
    parts = [np.zeros((4, 0))]
    total = len(rows.examples)
    for row, position, vectors in activations(model, rows, layer, lambda n: progress(n, total)):
        values = clamp.to(vectors).active(vectors)
        token, place = (values > 0).nonzero().unbind(1)
        columns = (place, row[token], position[token], values[token, place])
        parts.append(torch.stack([one.double().cpu() for one in columns]).numpy())
    place, row_, position_, value = _of_all(np.concatenate(parts, axis=1), Ranks.of(model))
    numbers = np.array(features, dtype=np.int64)[place.astype(np.int64)]
    order = np.lexsort((position_, row_, numbers, -value))
    columns_ = (numbers, row_.astype(np.int64), position_.astype(np.int64), value)
    return Firings(tuple(features), *(one[order] for one in columns_))


def _of_all(found: Float[np.ndarray, "4 firing"], ranks: Ranks) -> Float[np.ndarray, "4 firing"]:
    if ranks.size == 1:
        return found
    sizes = ranks.gather(torch.tensor([[found.shape[1]]]), [1] * ranks.size)
    parts = ranks.gather(torch.from_numpy(found), [int(one) for one in sizes])
    return torch.cat(parts, dim=1).numpy()


@dataclass(frozen=True)
class Passage:
    """A token that a latent fires on, with the text around it."""

    before: str
    token: str
    after: str
    value: float
    row: int


def passages(
    found: Firings, feature: int, rows: Rows, tokenizer: Any, number: int
) -> list[Passage]:
    """Give the strongest firings of a latent as text, at most one of each row."""
    return [
        Passage(*_cut(rows.examples[row].input_ids, position, tokenizer), value, row)
        for row, position, value in found.strongest(feature, number)
    ]


def _cut(ids: Sequence[int], position: int, tokenizer: Any) -> tuple[str, str, str]:
    """Give the text before a token, its own, and after it; decoded together, as spaces depend."""
    start = max(0, position - BEFORE)
    ends = (position, position + 1, position + 1 + AFTER)
    texts = [
        str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))
        for end in ends
    ]
    before, through, whole = texts
    return before, through.removeprefix(before), whole.removeprefix(through)
