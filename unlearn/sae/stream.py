"""Activations of a layer as a stream: read from the model as they are needed, kept on no disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn.activations import check_layer, read_layer
from unlearn.errors import UserError
from unlearn.ranks import Ranks, whole
from unlearn.sae.buffer import ShuffleBuffer
from unlearn.sae.corpus import Corpus, Reader, kept_positions
from unlearn.scoring import CPU_TOKENS, evaluation_mode

OUTLIER = 10.0
"""Vectors longer than this many times the median of their batch are left out."""
Vectors = Float[Tensor, "_ width"]


@dataclass
class Activations:
    """What leaves layer ``layer`` on the kept positions of rows; layers above are not run."""

    model: Any
    corpus: Corpus
    layer: int
    pad_id: int = 0

    def __post_init__(self) -> None:
        check_layer(self.model, self.layer)

    @property
    def device(self) -> Any:
        return self.model.get_input_embeddings().weight.device

    @property
    def width(self) -> int:
        return int(whole(self.model).config.get_text_config().hidden_size)

    def of_rows(self, rows: Sequence[int]) -> Vectors:
        """Give the vectors at kept positions, row by row, in float32.

        Raises:
            UserError: some are NaN or infinite; names the first such row.
        """
        batch = self.corpus.batch(rows, self.pad_id)
        batch = {name: one.to(self.device) for name, one in batch.items()}
        with evaluation_mode(self.model):
            hidden = read_layer(whole(self.model), {"": batch}, self.layer)[""].hidden
        hidden, kept = hidden.float(), kept_positions(batch)
        self._require_numbers(hidden, kept, rows)
        return hidden[kept]

    def _require_numbers(self, hidden: Tensor, kept: Tensor, rows: Sequence[int]) -> None:
        bad = (kept & ~hidden.isfinite().all(-1)).any(1)
        if bool(bad.any()):
            row = rows[int(bad.nonzero()[0])]
            raise UserError(
                f"what leaves layer {self.layer} is NaN or infinite in row {row} of the text",
                "load the model as bfloat16 or float32, or check its weights; rows count from 0",
            )

    def rows_per_batch(self, tokens: int) -> int:
        """Give how many rows go through the model at once."""
        if self.device.type == "cpu":
            tokens = min(tokens, CPU_TOKENS)
        longest = int((self.corpus.starts[1:] - self.corpus.starts[:-1]).max())
        return max(1, tokens // longest)


@dataclass
class Stream:
    """Shuffled batches of activations, the same for any number of ranks.

    Ranks share the forward passes and are all given all vectors, so each holds the whole buffer.
    """

    source: Activations
    reader: Reader
    buffer: ShuffleBuffer
    ranks: Ranks

    @classmethod
    def over(
        cls, source: Activations, rows: Sequence[int], *, seed: int, capacity: int, tokens: int
    ) -> "Stream":
        """Stream over rows; ``tokens`` go through the model at once, ``capacity`` are shuffled."""
        ranks = Ranks.of(source.model)
        reader = Reader(source.corpus, rows, seed, source.rows_per_batch(tokens))
        capacity = min(capacity, source.corpus.tokens(rows))
        stream = cls(source, reader, ShuffleBuffer(capacity, lambda number: [], seed), ranks)
        stream.buffer.fill = stream.read
        return stream

    def read(self, number: int) -> list[Vectors]:
        """Read batches of rows until they hold ``number`` kept positions."""
        planned: list[list[int]] = []
        for rows in self.reader:
            planned.append(rows)
            number -= self.source.corpus.tokens(rows)
            if number <= 0:
                break
        found: list[Vectors] = []
        for start in range(0, len(planned), self.ranks.size):
            found += self._together(planned[start : start + self.ranks.size])
        return found

    def _together(self, turn: list[list[int]]) -> list[Vectors]:
        """Read one batch on each rank; give what all have read, in the order of the text."""
        own = torch.zeros(0, self.source.width, device=self.source.device)
        if self.ranks.rank < len(turn):
            own = without_outliers(self.source.of_rows(turn[self.ranks.rank]))
        if self.ranks.size == 1:
            return [own]
        counts = self.ranks.gather(torch.tensor([[len(own)]]), [1] * self.ranks.size)
        sizes = [int(one) for one in counts]
        parts = self.ranks.gather(own.t().contiguous(), sizes)
        return [part.t() for part in parts[: len(turn)]]

    def take(self, number: int) -> Vectors:
        """Give the next batch."""
        return self.buffer.take(number)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Give all that the next batches depend on: tensors, and the place in the text."""
        return self.buffer.state(), {"epoch": self.reader.epoch, "place": self.reader.place}

    def load(self, tensors: dict[str, Tensor], place: dict[str, int]) -> None:
        """Go on from a state."""
        moved = {name: one.to(self.source.device) for name, one in tensors.items()}
        self.buffer.load(moved)
        self.reader.epoch, self.reader.place = place["epoch"], place["place"]


def without_outliers(vectors: Vectors) -> Vectors:
    """Leave out vectors longer than :data:`OUTLIER` times the median length of their batch.

    Models put very large vectors on a few positions (attention sinks), which say nothing of the
    text and would make up most of the squared error.
    """
    lengths = vectors.norm(dim=1)
    return vectors[lengths <= OUTLIER * lengths.median()] if len(lengths) else vectors


def scale_of(vectors: Vectors) -> float:
    """Give what vectors are multiplied by to have the mean length sqrt(width)."""
    return float(vectors.shape[1] ** 0.5 / vectors.double().norm(dim=1).mean())
