"""Streaming passes over rows: batches, masks, and backward passes that start below the head."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from unlearn.curvature.labels import LabelSource, Places, cotangents
from unlearn.curvature.layers import Tracked
from unlearn.curvature.taps import tapped, tapped_inputs
from unlearn.data.collate import batches_by_length, pad
from unlearn.data.encode import Example
from unlearn.forward import read_head
from unlearn.head import VocabularyHead, plain
from unlearn.ranks import Ranks, whole
from unlearn.scores import IGNORE, Scorer, label_mask
from unlearn.scoring import evaluation_mode

Progress = Callable[[int, int], None]
Cotangents = Callable[[VocabularyHead, Tensor], Tensor]
"""Gives the gradient at the head's input [label, width], for the states there."""
CPU_TOKENS = 1024
"""More tokens at once make a CPU no faster, and their activations are held until the way back."""


@dataclass(frozen=True)
class Batch:
    """A right-padded batch, the places of its rows in their set, and which positions count.

    ``loss``: position t predicts a labelled token. ``taking_part``: a real position at or before
    the last that predicts one; what comes later has no gradient, though it has activations, and
    must stay out of the input factors. Prompts take part.
    """

    input_ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    attended: Bool[Tensor, "batch seq"]
    rows: Int[Tensor, " batch"]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rows: Sequence[int], device: Any = None) -> "Batch":
        """Build a batch from padded tensors; padding on the left is moved to the right."""
        attended = tensors["attention_mask"].bool()
        order = (~attended).long().sort(dim=1, stable=True).indices
        parts = [tensors[name].gather(1, order).to(device) for name in ("input_ids", "labels")]
        attended = attended.gather(1, order).to(device)
        labels = parts[1].masked_fill(~attended, IGNORE)
        return cls(parts[0], labels, attended, torch.tensor(list(rows)))

    @cached_property
    def loss(self) -> Bool[Tensor, "batch seq"]:
        return label_mask(self.labels)

    @cached_property
    def taking_part(self) -> Bool[Tensor, "batch seq"]:
        return self.loss.flip(1).cummax(1).values.flip(1)

    @cached_property
    def token_places(self) -> Int[Tensor, " token"]:
        """Flat places of the positions that take part."""
        return self.taking_part.flatten().nonzero()[:, 0]

    @cached_property
    def tokens_per_row(self) -> list[int]:
        return [int(count) for count in self.taking_part.sum(1)]

    @property
    def num_labels(self) -> int:
        return int(self.loss.sum())

    @cached_property
    def label_places(self) -> Places:
        """The labelled positions, named by their row in the set and their place in it."""
        row, position = (part.cpu() for part in self.loss.nonzero().unbind(1))
        return Places(self.rows[row], position, self.labels.roll(-1, 1)[self.loss])

    def taken(self, values: Tensor) -> Tensor:
        """Give [token, width] of [batch, seq, width], or of the same rows flattened."""
        return values.reshape(-1, values.shape[-1]).index_select(0, self.token_places)


@dataclass(frozen=True)
class Rows:
    """A set of rows and how to go through it; ``progress`` is told (rows done, rows in all).

    At most ``batch_tokens`` tokens go through the model at once, or one row.
    """

    examples: Sequence[Example]
    pad_id: int = 0
    batch_tokens: int = 8192
    progress: Progress = lambda done, total: None


def batches(model: Any, given: Rows) -> Iterator[Batch]:
    """Give this process's share of the rows in batches of similar length.

    Rows without a label are left out: they have neither loss nor gradient.
    """
    examples, batch_tokens = given.examples, given.batch_tokens
    device, ranks = model.get_input_embeddings().weight.device, Ranks.of(model)
    if device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_TOKENS)
    kept = [
        at for at, one in enumerate(examples) if any(label != IGNORE for label in one.labels[1:])
    ]
    groups = batches_by_length([len(examples[at].input_ids) for at in kept], batch_tokens)
    done = 0
    for number, group in enumerate(groups):
        rows = [kept[place] for place in group]
        if number % ranks.size == ranks.rank:
            yield Batch.of(pad([examples[row] for row in rows], given.pad_id), rows, device)
        done += len(rows)
        given.progress(done, len(kept))


def read_states(
    model: Any,
    scorer: Scorer,
    batch: Batch,
    read: Callable[[VocabularyHead, Tensor], Any],
) -> Any:
    """Give what ``read`` makes of the last hidden states and the head.

    For a model whose head we cannot call apart these are its full logits, and the head is none. No
    layer skips positions here: every position that takes part is to be heard.
    """
    if scorer.head is None:
        vocabulary = plain(model).config.get_text_config().vocab_size
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        return read(VocabularyHead(nn.Identity(), vocabulary), logits)
    return read_head(model, scorer.head, read, batch.input_ids, batch.attended)


def backward_passes(
    model: Any,
    layers: Sequence[Tracked],
    stream: Iterator[Batch],
    source: LabelSource | Cotangents,
    heard: Callable[[Tracked, Batch, int, Tensor, Tensor], None],
    *,
    scorer: Scorer,
) -> None:
    """Go through the model and back once per batch and draw of labels.

    ``source`` says what is differentiated: a loss at labels, or whatever has the gradient that it
    gives for the states [label, width] of a batch (one it is asked for, in order of the batches).
    ``heard`` is told (layer, batch, draw, inputs [token, in], gradients of the summed loss
    [token, out]) of the positions that take part.
    """
    model = whole(model)
    current: list[tuple[Batch, int]] = []

    def hear(layer: Tracked, inputs: Tensor, grads: Tensor) -> None:
        batch, draw = current[-1]
        heard(layer, batch, draw, batch.taken(inputs), batch.taken(grads))

    with tapped(model, layers, hear), torch.enable_grad():
        for batch in stream:
            states, parts = read_states(model, scorer, batch, _reader(batch, source))
            for draw, part in enumerate(parts):
                current.append((batch, draw))
                torch.autograd.backward(states, part, retain_graph=draw + 1 < len(parts))
                current.pop()


def _reader(
    batch: Batch, source: LabelSource | Cotangents
) -> Callable[[VocabularyHead, Tensor], Any]:
    def read(head: VocabularyHead, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        there = batch.loss
        states = hidden[there].detach()
        if isinstance(source, LabelSource):
            parts = cotangents(head, states, batch.label_places, source)
        else:
            parts = [source(head, states)]
        laid_out = [
            torch.zeros_like(hidden).masked_scatter_(there[..., None], part.to(hidden.dtype))
            for part in parts
        ]
        return hidden, laid_out

    return read


@torch.no_grad()
def forward_passes(
    model: Any,
    layers: Sequence[Tracked],
    stream: Iterator[Batch],
    heard: Callable[[Tracked, Batch, Tensor], None],
    *,
    scorer: Scorer,
) -> None:
    """Go through the model once per batch; ``heard`` is told (layer, batch, inputs [token, in])."""
    model = whole(model)
    current: list[Batch] = []

    def hear(layer: Tracked, inputs: Tensor) -> None:
        heard(layer, current[-1], current[-1].taken(inputs))

    with evaluation_mode(model), tapped_inputs(layers, hear):
        for batch in stream:
            current.append(batch)
            read_states(model, scorer, batch, lambda head, hidden: hidden[:, :1])
            current.pop()
