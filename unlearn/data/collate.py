"""From examples to padded batches, and the pairing of forget rows with retain rows.

Which retain row meets forget row ``i`` in epoch ``e`` is a pure function of ``(seed, e, i)``: it
does not depend on worker count, rank or whether the run was interrupted.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from unlearn.data.answers import OtherAnswers
from unlearn.data.draws import uniform
from unlearn.data.encode import Example
from unlearn.data.pairs import SIDES

IGNORE = -100
EMPTY = -1
"""Index of a row that holds nothing: it fills up the batches, so that every rank gets as many."""


def retain_partner(seed: int, epoch: int, index: int, num_retain: int) -> int:
    """Give the retain row that meets forget row ``index`` in this epoch (with replacement)."""
    return uniform(seed, epoch, index, num_retain)


def pad(
    examples: Sequence[Example], pad_id: int, *, side: str = "right", multiple: int = 1
) -> dict[str, Tensor]:
    """Pad to the longest row: ``input_ids``, ``attention_mask`` and ``labels``, each [batch, seq].

    The attention mask comes from the lengths, never from comparing with ``pad_id``: a real EOS
    stays visible when the tokenizer pads with EOS.
    """
    longest = -(-max(len(example.input_ids) for example in examples) // multiple) * multiple
    ids = torch.full((len(examples), longest), pad_id)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        span = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, span] = torch.tensor(example.input_ids)
        labels[row, span] = torch.tensor(example.labels)
        attention[row, span] = 1
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


@dataclass(frozen=True)
class Item:
    """One row of one stream; ``index`` is its place in the stream, for reference look-ups.

    Its loss counts ``weight`` times.
    """

    example: Example
    index: int
    weight: float = 1.0


NOTHING = Example(input_ids=[0], labels=[IGNORE], prompt_length=1, row=EMPTY, important=(False,))
"""The empty row: one token that is not attended to and predicts nothing."""


class StreamDataset(Dataset):
    """Every forget row with the rows of the other streams that meet it, by (epoch, index).

    A third part of a key is how many times their losses count.

    The length is that of the ``anchor`` stream: the forget set, or else the first stream. Rows of
    other streams are drawn, except that ``others`` follow the rows whose questions they answer, and
    that the two sides of a pair go together. Items hold all streams, or those named in ``only``.
    """

    def __init__(
        self,
        streams: Mapping[str, Sequence[Example]],
        *,
        seed: int,
        others: Mapping[str, OtherAnswers] | None = None,
        only: Collection[str] | None = None,
        anchor: str | None = None,
    ) -> None:
        self.streams = dict(streams)
        self.others = dict(others or {})
        self.seed = seed
        self.anchor = anchor or ("forget" if "forget" in streams else next(iter(streams)))
        self.only = {*self.streams, *self.others} if only is None else set(only)

    def __len__(self) -> int:
        return len(self.streams[self.anchor])

    def __getitem__(self, key: tuple[int, int] | tuple[int, int, float]) -> dict[str, Item]:
        epoch, index, *weight = key
        names = [name for name in (*self.streams, *self.others) if name in self.only]
        if index == EMPTY:
            return {name: Item(NOTHING, EMPTY) for name in names}
        items = {name: self._item(name, epoch, index) for name in names}
        if not weight:
            return items
        return {name: replace(item, weight=weight[0]) for name, item in items.items()}

    def row(self, stream: str, epoch: int, index: int) -> int:
        """Give the row of a stream that takes part when the anchor's row is ``index``."""
        if stream == self.anchor or {stream, self.anchor} == set(SIDES):
            return index
        return retain_partner(self.seed, epoch, index, len(self.streams[stream]))

    def _item(self, name: str, epoch: int, index: int) -> Item:
        if name in self.streams:
            at = self.row(name, epoch, index)
            return Item(self.streams[name][at], at)
        other = self.others[name]
        at = other.draws.place(epoch, self.row(other.draws.belongs, epoch, index))
        return Item(other.examples[at], at)


class EpochSampler(Sampler[tuple[int, int]]):
    """A permutation of the rows that is a function of (seed, epoch); yields (epoch, index).

    :data:`EMPTY` rows are added until the length is a multiple of ``multiple``: the rows that all
    ranks together take in one forward pass each.
    """

    def __init__(self, size: int, *, seed: int, multiple: int = 1) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.empty = -size % multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size + self.empty

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(uniform(self.seed, self.epoch, -1, 2**62))
        for index in torch.randperm(self.size, generator=generator).tolist():
            yield self.epoch, index
        for _ in range(self.empty):
            yield self.epoch, EMPTY


@dataclass(frozen=True)
class Collator:
    """Turn items into a nested batch ``{stream: {input_ids, attention_mask, labels, index, …}}``.

    ``reference`` gives, per stream, one list of token log-probs (nats) per row, laid out like the
    row's tokens shifted by one; they travel with the batch as ``reference_log_probs`` [batch, seq].
    """

    pad_id: int
    reference: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def __call__(self, items: Sequence[Mapping[str, Item]]) -> dict[str, dict[str, Any]]:
        return {name: self._stream(name, [item[name] for item in items]) for name in items[0]}

    def _stream(self, name: str, items: Sequence[Item]) -> dict[str, Tensor]:
        batch = pad([item.example for item in items], self.pad_id)
        batch["index"] = torch.tensor([item.index for item in items])
        batch["attention_mask"][batch["index"] == EMPTY] = 0
        if any(item.weight != 1.0 for item in items):
            batch["weight"] = torch.tensor([item.weight for item in items])
        marks = [item.example.important for item in items]
        if any(mark is not None for mark in marks):
            batch["important"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
            for place, mark in enumerate(marks):
                batch["important"][place, : len(mark or ())] = torch.tensor(mark or ())
        if name in self.reference:
            stored = self.reference[name]
            padded = torch.zeros(batch["input_ids"].shape, dtype=stored[0].dtype)
            for place, item in enumerate(items):
                if item.index != EMPTY:
                    padded[place, : len(stored[item.index])] = stored[item.index]
            batch["reference_log_probs"] = padded
        return batch


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group row indices of similar length, longest first, each group within the token budget."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
