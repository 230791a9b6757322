"""How far a model has gone from where it was: forget loss and retain KL, on fixed rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearn.curvature.passes import Batch, Rows, batches, read_states
from unlearn.data.encode import Example
from unlearn.head import VocabularyHead, piece_size
from unlearn.ranks import Ranks, whole
from unlearn.scores import Scorer
from unlearn.scoring import evaluation_mode, scored


@torch.no_grad()
def mean_nll(model: Any, rows: Rows, scorer: Scorer) -> float:
    """Give the mean negative log-likelihood of labelled tokens: nats per token."""
    total, count = 0.0, 0
    found = scored(
        model, rows.examples, scorer=scorer, pad_id=rows.pad_id, batch_tokens=rows.batch_tokens
    )
    for _, scores in found:
        total -= float(scores.log_probs.double().sum())
        count += int(scores.mask.sum())
    return total / count


@dataclass(frozen=True)
class Reference:
    """What a model said at the labelled positions of some rows, to be compared with later.

    Kept are the states that reach the vocabulary head, on the CPU: with them and the head, which
    must not change, distributions are exact at a fraction of their size. (Where the head cannot be
    called apart they are the logits.)
    """

    rows: Rows
    scorer: Scorer
    states: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: Any, rows: Rows, scorer: Scorer) -> "Reference":
        """Ask a model now; every process keeps its share."""
        found = tuple(states.cpu() for _, states in _states(model, rows, scorer))
        return cls(rows, scorer, found)

    @torch.no_grad()
    def kl(self, model: Any) -> float:
        """Give KL(then || now), a mean over labelled tokens: nats per token."""
        total, count = 0.0, 0
        pairs = zip(_states(model, self.rows, self.scorer), self.states, strict=True)
        for (head, now), then in pairs:
            size = piece_size(head, now)
            for ours, theirs in zip(now.split(size), then.to(now.device).split(size), strict=True):
                q, p = (head.logits(one).log_softmax(-1) for one in (ours, theirs))
                total += float((p.exp() * (p - q)).sum(-1).double().sum())
            count += len(now)
        sums = Ranks.of(model).add(torch.tensor([total, count], dtype=torch.float64))
        return float(sums[0] / sums[1])


def _states(model: Any, rows: Rows, scorer: Scorer) -> Iterator[tuple[VocabularyHead, Tensor]]:
    """Give the head and the states [label, width] that reach it, batch by batch."""
    model = whole(model)
    with evaluation_mode(model):
        for batch in batches(model, rows):
            yield read_states(model, scorer, batch, _at_labels(batch))


def _at_labels(batch: Batch) -> Any:
    def read(head: VocabularyHead, hidden: Tensor) -> tuple[VocabularyHead, Tensor]:
        return head, hidden[batch.loss]

    return read


def spaced(examples: Sequence[Example], number: int) -> list[int]:
    """Give this many places at equal distances; rows in order of a subject are spread over it."""
    number = min(number, len(examples))
    return [len(examples) * place // number for place in range(number)]
