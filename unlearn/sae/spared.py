"""Positions that are left alone: the first of every row, and what the tokenizer puts in front.

What stands there is the same in every text, and often very large (an attention sink): a latent that
is active there says nothing of the text, and a change there would break the model everywhere.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def spared(
    ids: Int[Tensor, "batch seq"], first: Bool[Tensor, "batch seq"], front: Sequence[int]
) -> Bool[Tensor, "batch seq"]:
    """Mark first positions, and tokens of ``front`` (BOS) wherever they stand."""
    if not front:
        return first
    return first | torch.isin(ids, torch.tensor(list(front), device=ids.device))


def first_positions(
    ids: Int[Tensor, "batch seq"],
    positions: Tensor | None = None,
    attended: Tensor | None = None,
    past: int = 0,
) -> Bool[Tensor, "batch seq"]:
    """Mark where a row begins, from what a call of a decoder says of its tokens.

    ``positions`` [rows, seq] count from 0 in each row, however rows are laid out: packed, in a
    tree, padded, or one token at a time. Without them ``attended`` [batch, past + seq] tells
    padding from tokens, and without that the first column is meant, unless ``past`` tokens are in
    the cache.
    """
    if positions is not None:
        flat = positions[0] if positions.ndim == 3 else positions  # several kinds, text first
        return (flat == 0).expand_as(ids)
    if isinstance(attended, Tensor) and attended.ndim == 2:
        real = attended.bool()
        return (real & (real.long().cumsum(-1) == 1))[:, -ids.shape[1] :]
    found = torch.zeros_like(ids, dtype=torch.bool)
    found[:, 0] = past == 0
    return found
