"""How far a model has moved from where it started, on the rows that it should keep."""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearn.data import pad_token_id
from unlearn.data.collate import batches_by_length, pad
from unlearn.data.encode import Example
from unlearn.evals.benchmark import Metric, Progress, Result
from unlearn.evals.forget_retain import Split
from unlearn.forward import read_head
from unlearn.head import CHUNK_BYTES, VocabularyHead, piece_size
from unlearn.objectives.distribution import kl_labels
from unlearn.ranks import Ranks, whole
from unlearn.scores import Scorer, label_mask
from unlearn.scoring import CPU_TOKENS, evaluation_mode


@dataclass(frozen=True)
class RetainKl:
    """KL(start || model) on the retain set: a mean over its labelled tokens, nats per token.

    ``load_start`` gives the model before unlearning; it is held while measuring and then let go.
    The starting model itself scores 0. Nothing is stored: whole distributions would take
    gigabytes, so both models are asked again for every measurement.
    """

    retain: Split
    load_start: Callable[[], Any]
    max_rows: int | None = 400
    batch_tokens: int = 8192

    name = "retain_kl"
    version = "1"

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress = lambda stage, done, total: None,
        weights_hash: str | None = None,
    ) -> Result:
        """Measure a model; ``progress`` is told (stage, rows done, rows in all)."""
        examples = self.retain.first(self.max_rows).examples
        start = self.load_start()
        value, tokens = mean_kl(
            start,
            model,
            examples,
            pad_id=pad_token_id(tokenizer),
            batch_tokens=self.batch_tokens,
            progress=lambda done: progress("retain: KL from the start", done, len(examples)),
        )
        del start
        gc.collect()
        rows = len({example.row for example in examples})
        settings = {"rows": {"retain": {"evaluated": rows, "given": len(self.retain.rows)}}}
        metrics = {"retain_kl": Metric(value, "lower", None, tokens)}
        return Result(self.name, self.version, metrics, [], settings)


def mean_kl(
    start: Any,
    model: Any,
    examples: Sequence[Example],
    *,
    pad_id: int = 0,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[float, int]:
    """Give the mean of KL(start || model) over labelled tokens, in nats, and their number.

    Only labelled positions reach the vocabulary heads, a few at a time. Processes of a launch share
    the batches.
    """
    start, model = whole(start), whole(model)
    scorers = Scorer.for_model(start), Scorer.for_model(model)
    ranks = Ranks.of(model)
    groups = batches_by_length(
        [len(example.input_ids) for example in examples], _budget(model, scorers, batch_tokens)
    )
    total, tokens, done = 0.0, 0, 0
    with evaluation_mode(start), evaluation_mode(model):
        for number, places in enumerate(groups):
            done += len(places)
            if number % ranks.size == ranks.rank:
                batch = pad([examples[place] for place in places], pad_id)
                total += _summed(start, model, scorers, batch)
                tokens += int(label_mask(batch["labels"]).sum())
            progress(done)
    sums = ranks.add(torch.tensor([total, tokens], dtype=torch.float64))
    return (float(sums[0] / sums[1]) if sums[1] else math.nan), int(sums[1])


def _summed(
    start: Any, model: Any, scorers: tuple[Scorer, Scorer], batch: Mapping[str, Tensor]
) -> float:
    """Add up one batch, in nats."""
    theirs, ours = (_on_device(batch, one) for one in (start, model))
    heads = [scorer.head for scorer in scorers]
    if heads[0] is None or heads[1] is None:
        reference = scorers[0](start, theirs, want={"logits"})
        policy = scorers[1](model, ours, want={"logits"})
        return float(kl_labels(policy, reference).double().sum())
    there, here = (label_mask(one["labels"]) for one in (theirs, ours))
    expected = _read(start, heads[0], lambda head, hidden: hidden[there], theirs)
    first = heads[0]

    def apart(head: VocabularyHead, hidden: Tensor) -> Tensor:
        size = piece_size(head, hidden)
        pairs = zip(expected.split(size), hidden[here].split(size), strict=True)
        return torch.stack([_kl(first.logits(p), head.logits(q)) for p, q in pairs]).sum()

    return float(_read(model, heads[1], apart, ours))


def _on_device(batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: part.to(device) for name, part in batch.items()}


def _read(model: Any, head: VocabularyHead, read: Any, batch: Mapping[str, Tensor]) -> Tensor:
    attended = batch["attention_mask"].bool()
    found: Tensor = read_head(model, head, read, batch["input_ids"], attended)
    return found


def _kl(reference: Tensor, policy: Tensor) -> Tensor:
    """Add up KL(reference || policy) over positions, from logits."""
    theirs, ours = reference.log_softmax(-1), policy.to(reference).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).double().sum()


def logit_bytes(model: Any, batch_tokens: int) -> int:
    """Bound what one batch takes: hidden states of both models, and the logits of one piece."""
    config = model.config.get_text_config()
    return 2 * batch_tokens * config.hidden_size * 8 + 5 * CHUNK_BYTES


def _budget(model: Any, scorers: tuple[Scorer, Scorer], batch_tokens: int) -> int:
    """Say how many tokens go through at once; where logits of all are needed, they are bounded."""
    if next(model.parameters()).device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_TOKENS)
    if all(scorer.head for scorer in scorers):
        return batch_tokens
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(batch_tokens, CHUNK_BYTES // (4 * vocabulary)))
