"""Drafts that are made from the true continuation: right with a chance, or as a test wants them."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch


def with_drafts(
    predictor: Any, true: Sequence[int], make: Callable[[list[int]], list[int]], check: Any = None
) -> None:
    """Let drafts be ``make`` of the tokens that truly follow; ``true`` is prompt and continuation.

    ``check`` is given the cache and the tokens that are verified, whenever drafts are made.
    """
    held: dict[str, Any] = {}
    read = type(predictor).read

    def reading(embedded: Any, positions: Any, visible: Any, cache: Any) -> Any:
        held["cache"] = cache
        return read(predictor, embedded, positions, visible, cache)

    def draft(last: Any, hidden: Any, *, shortlist: Any = None) -> Any:
        number = held["cache"].get_seq_length() + 1  # all verified tokens but the last are kept
        assert int(last) == true[number - 1]
        if check:
            check(held["cache"], true[:number])
        coming = [*true[number:], *[0] * len(hidden)][: len(hidden)]
        return torch.tensor(make(coming))

    predictor.read, predictor.draft = reading, draft


def right_with(chance: float, vocabulary: int, seed: int = 0) -> Callable[[list[int]], list[int]]:
    """Change each token into another, unless a draw is below the chance."""
    draw = random.Random(seed)
    return lambda coming: [
        token
        if draw.random() < chance
        else (token + 1 + draw.randrange(vocabulary - 1)) % vocabulary
        for token in coming
    ]
