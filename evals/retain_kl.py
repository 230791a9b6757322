"""How far a model has moved from where it started, on the rows that it should keep."""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unlearn.data import pad_token_id
from unlearn.data.collate import batches_by_length, pad
from unlearn.data.encode import Example
from unlearn.evals.benchmark import Metric, Progress, Result
from unlearn.evals.forget_retain import Split
from unlearn.head import CHUNK_BYTES
from unlearn.objectives.distribution import kl_labels
from unlearn.ranks import Ranks, whole
from unlearn.scores import Scorer
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

    Logits of one batch at a time are held, of at most ``CHUNK_BYTES`` for each model (or one row).
    Processes of a launch share the batches.
    """
    start, model = whole(start), whole(model)
    scorers = Scorer.for_model(start), Scorer.for_model(model)
    ranks = Ranks.of(model)
    groups = batches_by_length(
        [len(example.input_ids) for example in examples], _budget(model, batch_tokens)
    )
    total, tokens, done = 0.0, 0, 0
    with evaluation_mode(start), evaluation_mode(model):
        for number, places in enumerate(groups):
            done += len(places)
            if number % ranks.size == ranks.rank:
                batch = pad([examples[place] for place in places], pad_id)
                distance, count = _summed(start, model, scorers, batch)
                total, tokens = total + distance, tokens + count
            progress(done)
    sums = ranks.add(torch.tensor([total, tokens], dtype=torch.float64))
    return (float(sums[0] / sums[1]) if sums[1] else math.nan), int(sums[1])


def _summed(
    start: Any, model: Any, scorers: tuple[Scorer, Scorer], batch: Any
) -> tuple[float, int]:
    """Add up one batch: nats, and labelled tokens."""
    said = []
    for scorer, one in zip(scorers, (start, model), strict=True):
        there = {name: part.to(next(one.parameters()).device) for name, part in batch.items()}
        said.append(scorer(one, there, want={"logits"}))
    reference, policy = said
    distance = kl_labels(policy, reference).double().sum()
    return float(distance), int(policy.mask.sum())


def logit_bytes(model: Any, batch_tokens: int) -> int:
    """Bound what the logits of one batch take: those of both models, twice each, and one more."""
    vocabulary = model.config.get_text_config().vocab_size
    return 5 * 4 * vocabulary * _budget(model, batch_tokens)


def _budget(model: Any, batch_tokens: int) -> int:
    """Say how many tokens go through at once, so that their logits stay within bounds."""
    vocabulary = model.config.get_text_config().vocab_size
    if next(model.parameters()).device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_TOKENS)
    return max(1, min(batch_tokens, CHUNK_BYTES // (4 * vocabulary)))
