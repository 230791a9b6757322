"""Where masks stand: their positions, what they are to foretell, and what each token may see.

A block of masks is anchored at a token: mask j of a block anchored at token a stands at position
a + j and foretells token a + j + 1 (positions from 0). It sees the tokens up to its anchor and the
earlier masks of its block, nothing else; ordinary tokens never see a mask (Samragh et al. 2025,
section 2.1). Ordinary tokens come first in memory, then the blocks: what is kept of a forward
pass is a prefix, and the gate of the LoRA is a suffix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED = -100
Block = tuple[int, int]
"""Index of the ordinary token that a block is anchored at, and the number of its masks."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``k`` masks on one training sequence of ``length`` tokens.

    ``labels`` are -100 where there is nothing to foretell: beyond the end, or not to be learnt.
    ``counterpart``: the ordinary position that foretells the same token from the whole text.
    ``previous``: the token just before the one foretold.
    """

    length: int
    k: int
    anchors: Int[Tensor, " anchor"]
    positions: Int[Tensor, "anchor k"]
    counterpart: Int[Tensor, "anchor k"]
    labels: Int[Tensor, "anchor k"]
    previous: Int[Tensor, "anchor k"]

    @classmethod
    def at(
        cls,
        anchors: Int[Tensor, " anchor"],
        ids: Int[Tensor, " token"],
        labels: Int[Tensor, " token"],
        k: int,
    ) -> "Blocks":
        """Put a block after each anchor; ``labels`` are the tokens themselves or -100."""
        length = len(ids)
        positions = anchors[:, None] + torch.arange(1, k + 1, device=ids.device)
        inside = positions + 1 < length
        place = positions.clamp_max(length - 1)
        foretold = torch.where(inside, labels[(place + 1).clamp_max(length - 1)], IGNORED)
        return cls(length, k, anchors, positions, place, foretold, ids[place])

    @property
    def pairs(self) -> Bool[Tensor, "anchor k"]:
        """Mark the masks that are to learn something."""
        return self.labels != IGNORED

    def visible(self) -> Bool[Tensor, "mask seen"]:
        """Say what each mask sees of the tokens, and of the masks after them."""
        masks = self.positions.numel()
        at = torch.arange(self.length, device=self.anchors.device)
        tokens = (at <= self.anchors[:, None]).repeat_interleave(self.k, 0)
        block = torch.arange(masks, device=at.device) // self.k
        own = (block[:, None] == block).tril()
        return torch.cat([tokens, own], 1)


def eligible(labels: Int[Tensor, " token"]) -> Int[Tensor, " anchor"]:
    """List the tokens that a block may be anchored at.

    Those whose own next token is to be learnt and is not the last: a text's prompt gets no masks.
    """
    learnt = labels[1:] != IGNORED
    after = torch.zeros_like(learnt)
    after[:-1] = learnt[1:]
    return (learnt & after).nonzero()[:, 0]


def draw_anchors(
    labels: Int[Tensor, " token"], most: int, generator: torch.Generator
) -> Int[Tensor, " anchor"]:
    """Draw at most ``most`` of the eligible anchors, all alike, in the order of the text.

    The mean loss over the drawn is an unbiased estimate of that over all, up to blocks cut short
    by the end.
    """
    found = eligible(labels)
    if len(found) <= most:
        return found
    chosen = torch.randperm(len(found), generator=generator)[:most].to(found.device)
    return found[chosen.sort().values]


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may be used with gradients too
def step_layout(
    regular: int, blocks: tuple[Block, ...], device: torch.device | None = None
) -> tuple[Int[Tensor, " token"], Bool[Tensor, "token token"], Int[Tensor, " mask"]]:
    """Lay out one step of decoding: ordinary tokens, then blocks of masks.

    Gives each token's position after the first one's, what it sees of this step (of what came
    before it sees all), and which mask each mask is, from 0. They are kept, on the device, since
    every copy to it is a wait: do not change them.
    """
    total = regular + sum(length for _, length in blocks)
    offsets, which = list(range(regular)), []
    sees = torch.zeros(total, total, dtype=torch.bool)
    sees[:regular, :regular] = torch.ones(regular, regular, dtype=torch.bool).tril()
    start = regular
    for anchor, length in blocks:
        end = start + length
        sees[start:end, : anchor + 1] = True
        sees[start:end, start:end] = torch.ones(length, length, dtype=torch.bool).tril()
        offsets += [anchor + 1 + j for j in range(length)]
        which += list(range(length))
        start = end
    places, masks = torch.tensor(offsets), torch.tensor(which, dtype=torch.long)
    return places.to(device), sees.to(device), masks.to(device)


def block_rows(regular: int, blocks: Sequence[Block], anchor: int) -> slice | None:
    """Give the rows of the block at an anchor; None where there is none."""
    start = regular
    for at, length in blocks:
        if at == anchor:
            return slice(start, start + length)
        start += length
    return None
