"""The tokens that activations are read from: rows of one context each, in one order per epoch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unlearn.data.draws import uniform
from unlearn.data.encode import IGNORE
from unlearn.errors import UserError

NO_LIMIT = 2**62


@dataclass(frozen=True)
class Corpus:
    """Rows of tokens, laid end to end; each begins with the ``front`` tokens of its model (BOS).

    What stands on those first positions is read by attention, but is no activation to learn: the
    vectors there are the same in every row, and often very large.
    """

    ids: Int[np.ndarray, " token"]
    starts: Int[np.ndarray, " start"]
    front: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    def tokens(self, rows: Sequence[int]) -> int:
        """Count the positions of some rows that are learnt from."""
        return sum(int(self.starts[row + 1] - self.starts[row]) - self.front for row in rows)

    def batch(self, rows: Sequence[int], pad_id: int = 0) -> dict[str, Tensor]:
        """Give rows padded on the right; labels are all tokens that are learnt from."""
        parts = [self.ids[self.starts[row] : self.starts[row + 1]] for row in rows]
        width = max(map(len, parts))
        ids = torch.full((len(parts), width), pad_id)
        attention = torch.zeros_like(ids)
        for place, part in enumerate(parts):
            ids[place, : len(part)] = torch.from_numpy(part.astype(np.int64))
            attention[place, : len(part)] = 1
        labels = ids.masked_fill(attention == 0, IGNORE)
        labels[:, : self.front] = IGNORE
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}

    def split(self, held_out: int, seed: int) -> "tuple[list[int], list[int]]":
        """Give rows to train on, and rows to measure on: ``held_out``, at most a tenth, at least 1.

        Raises:
            UserError: there is only one row.
        """
        if len(self) < 2:
            raise UserError(
                "the text fills one context, and one must be held out to measure on",
                "give more text, or a shorter context",
            )
        order = _order(len(self), seed, -1)
        kept = max(1, min(held_out, len(self) // 10))
        return sorted(order[kept:]), sorted(order[:kept])


def kept_positions(batch: dict[str, Tensor]) -> Bool[Tensor, "batch seq"]:
    """Mark the positions whose activations are learnt: neither padding nor what stands in front."""
    return batch["labels"] != IGNORE


def packed(
    texts: Iterable[Sequence[int]], *, front: Sequence[int], end: int | None, context: int
) -> Corpus:
    """Lay texts end to end, each ended by ``end``, and cut them into contexts.

    Each row begins with ``front``; the last one may be shorter.
    """
    body = _body(context, front)
    ids = np.concatenate([_ended(text, end) for text in texts] or [np.zeros(0, np.int32)])
    return _corpus([ids[at : at + body] for at in range(0, len(ids), body)], front)


def apart(texts: Iterable[Sequence[int]], *, front: Sequence[int], context: int) -> Corpus:
    """Give every text a row of its own, or as many as it fills."""
    body = _body(context, front)
    found = [np.asarray(text, np.int32) for text in texts]
    return _corpus([t[at : at + body] for t in found for at in range(0, len(t), body)], front)


def _body(context: int, front: Sequence[int]) -> int:
    if context <= len(front) + 1:
        raise UserError(
            f"context={context} leaves no room for text", f"give {len(front) + 2} or more"
        )
    return context - len(front)


def _ended(text: Sequence[int], end: int | None) -> np.ndarray:
    last = [] if end is None or (len(text) and text[-1] == end) else [end]
    return np.asarray([*text, *last], np.int32)


def _corpus(bodies: Sequence[np.ndarray], front: Sequence[int]) -> Corpus:
    if not bodies:
        raise UserError("the text holds no token", "give a source with text in it")
    before = np.asarray(front, np.int32)
    rows = [np.concatenate([before, body]) for body in bodies]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Corpus(np.concatenate(rows), starts.astype(np.int64), len(front))


@dataclass
class Reader:
    """Goes through rows without end, in another order each epoch; a place to go on from.

    The order is a function of (seed, epoch): it is the same on every rank and after a resume.
    """

    corpus: Corpus
    rows: Sequence[int]
    seed: int
    rows_per_batch: int
    epoch: int = 0
    place: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            order = _order(len(self.rows), self.seed, self.epoch)
            while self.place < len(order):
                at = order[self.place : self.place + self.rows_per_batch]
                self.place += len(at)
                yield [self.rows[one] for one in at]
            self.epoch, self.place = self.epoch + 1, 0


def _order(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(uniform(seed, epoch, -2, NO_LIMIT))
    return [int(place) for place in torch.randperm(size, generator=generator)]


def corpus_of(
    examples: Sequence[Any], *, front: Sequence[int], end: int | None, context: int, pack: bool
) -> Corpus:
    """Build a corpus from encoded rows (:class:`unlearn.data.Example`), one text each."""
    texts = (_without(one.input_ids, front) for one in examples)
    if pack:
        return packed(texts, front=front, end=end, context=context)
    return apart(texts, front=front, context=context)


def _without(ids: Sequence[int], front: Sequence[int]) -> Sequence[int]:
    begins = list(front)
    return ids[len(begins) :] if list(ids[: len(begins)]) == begins else ids
