"""Leaving rows out of an epoch by their last loss, so that training takes fewer steps.

How many rows an epoch has is known before training begins: the schedule of the learning rate needs
the number of steps. So rows are grouped by the order of their losses, never by thresholds.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Sampler

from unlearn.data.collate import EMPTY
from unlearn.data.draws import uniform
from unlearn.posttrain.reweigher import Batch, Gather, gathered, rows_of
from unlearn.posttrain.reweighting import Rows
from unlearn.scores import Scores

Losses = Float[Tensor, " row"]
Chosen = tuple[list[int], list[float]]
"""Rows of an epoch in their order, and how many times the loss of each counts."""


@dataclass(frozen=True)
class Pruning:
    """Which rows an epoch has.

    ``infobatch``: of the ``easy`` share of the rows, those with the lowest losses, only the share
    ``keep`` is drawn, and each then counts 1 / keep times, so that the expected gradient of an
    epoch stays that of all rows (Qin et al. 2024, "InfoBatch", arXiv:2303.04947; deviation: the
    easy rows are a share, not those below the mean loss).

    ``seta``: the share ``keep`` is drawn of all rows, and sorted by loss into ``groups`` of one
    size; an epoch has a window of the share ``window`` of the groups, which moves from easy to hard
    by one group per epoch and begins again (Zhou et al. 2025, "SeTa", arXiv:2503.13385; deviation:
    groups of one size instead of k-means).

    The first epoch has all rows (of ``seta``: all that are drawn), as no losses are known; after
    the share ``anneal_from`` of the epochs it is so again.
    """

    method: Literal["infobatch", "seta"] = "infobatch"
    keep: float = 0.5
    easy: float = 0.5
    groups: int = 10
    window: float = 0.5
    anneal_from: float = 0.875

    def rows(self, epoch: int, epochs: int, size: int) -> int:
        """Give how many rows an epoch has."""
        if self.method == "infobatch":
            few = math.floor(self.easy * size)
            return size if self._whole(epoch, epochs) else size - few + self._kept(few)
        drawn = self._kept(size)
        start, end = self._span(epoch, epochs, drawn)
        return end - start

    def _kept(self, size: int) -> int:
        return max(1, round(self.keep * size)) if size else 0

    def _whole(self, epoch: int, epochs: int) -> bool:
        return epoch == 0 or epoch >= self.anneal_from * epochs

    def window_start(self, epoch: int) -> int:
        """Give the first group of SeTa's window."""
        return epoch % (self.groups - self._width + 1)

    @property
    def _width(self) -> int:
        return min(self.groups, max(1, round(self.window * self.groups)))

    def _span(self, epoch: int, epochs: int, drawn: int) -> tuple[int, int]:
        if self._whole(epoch, epochs):
            return 0, drawn
        first = self.window_start(epoch)
        return first * drawn // self.groups, (first + self._width) * drawn // self.groups

    def choose(self, losses: Losses, epoch: int, epochs: int, seed: int) -> Chosen:
        """Choose an epoch's rows, in the order in which they are trained on.

        A function of its arguments. Rows of which no loss is known count as hard.
        """
        size = len(losses)
        draw = torch.Generator().manual_seed(uniform(seed, epoch, -1, 2**62, "prune"))
        order = torch.randperm(size, generator=draw)
        known = losses.nan_to_num(nan=math.inf)
        if self.method == "seta":
            drawn = order[: self._kept(size)]
            ranked = drawn[known[drawn].argsort(stable=True)]
            start, end = self._span(epoch, epochs, len(drawn))
            rows = ranked[start:end]
            mixed = rows[torch.randperm(len(rows), generator=draw)].tolist()
            return mixed, [1.0] * len(mixed)
        if self._whole(epoch, epochs):
            return order.tolist(), [1.0] * size
        easy = known.argsort(stable=True)[: math.floor(self.easy * size)]
        kept = easy[torch.randperm(len(easy), generator=draw)[: self._kept(len(easy))]]
        weights = torch.ones(size)
        weights[easy] = 0.0
        weights[kept] = len(easy) / max(1, len(kept))
        rows = order[weights[order] > 0]
        return rows.tolist(), weights[rows].tolist()


@dataclass
class Pruner:
    """The last loss of every row, and the rows of the epochs that are trained on just now.

    ``size`` rows are in the set. The losses are equal on all ranks; they and the rows chosen travel
    in the checkpoints, so a resumed run goes on with the rows that it would have had.
    """

    how: Pruning
    size: int
    epochs: int
    seed: int
    losses: Losses = field(init=False)
    chosen: dict[int, Chosen] = field(default_factory=dict)
    _seen: list[Rows] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.losses = torch.full((self.size,), torch.nan)

    @property
    def visits(self) -> int:
        """Rows trained on in all epochs; without pruning it would be ``size * epochs``."""
        return sum(self.how.rows(epoch, self.epochs, self.size) for epoch in range(self.epochs))

    def of_epoch(self, epoch: int) -> Chosen:
        """Give an epoch's rows; they are chosen when the first of them is asked for."""
        if epoch not in self.chosen:
            found = self.how.choose(self.losses, epoch, self.epochs, self.seed)
            self.chosen = {e: c for e, c in self.chosen.items() if e >= epoch - 1}
            self.chosen[epoch] = found
        return self.chosen[epoch]

    def see(self, scores: Any, batch: Batch) -> None:
        """Note the losses of a forward pass."""
        assert isinstance(scores, Scores)
        self._seen.append(rows_of(scores, batch, "token"))

    def after_step(self, gather: Gather, size: int) -> None:
        """Take in the losses of the step, of all ranks; ``size`` rows at most are in one pass."""
        rows = Rows.joined([gathered(rows, gather, size) for rows in self._seen])
        self.losses[rows.index[rows.valid].cpu()] = rows.losses[rows.valid].float().cpu()
        self._seen = []

    def state_dict(self) -> dict[str, Any]:
        known = [None if math.isnan(loss) else loss for loss in self.losses.tolist()]
        return {"losses": known, "chosen": {str(e): list(c) for e, c in self.chosen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        known = [math.nan if loss is None else loss for loss in state["losses"]]
        self.losses = torch.tensor(known, dtype=torch.float32)
        self.chosen = {int(e): (rows, weights) for e, (rows, weights) in state["chosen"].items()}


class PrunedSampler(Sampler[tuple[int, int, float]]):
    """The rows of all epochs in one pass: (epoch, row, how many times its loss counts).

    The rows of an epoch are chosen when its first one is due. (Batches are fetched a step ahead:
    the losses of the last of them come an epoch late.) An epoch that a resumed run skips is not
    chosen again. :data:`EMPTY` rows fill the last batch of all ranks.
    """

    def __init__(self, pruner: Pruner, *, multiple: int = 1) -> None:
        self.pruner = pruner
        self.empty = -pruner.visits % multiple

    def __len__(self) -> int:
        return self.pruner.visits + self.empty

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        pruner = self.pruner
        first = min(pruner.chosen, default=0)
        for epoch in range(pruner.epochs):
            if epoch < first:  # skipped by a resumed run: nobody looks at these
                count = pruner.how.rows(epoch, pruner.epochs, pruner.size)
                yield from ((epoch, EMPTY, 1.0) for _ in range(count))
                continue
            for row, weight in zip(*pruner.of_epoch(epoch), strict=True):
                yield epoch, row, weight
        for _ in range(self.empty):
            yield pruner.epochs, EMPTY, 1.0
