"""One pass over the model: every sequence is scored once, every prompt is answered once.

All metrics are functions of what this module gives; none of them calls the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearn.data.collate import IGNORE, batches_by_length, pad
from unlearn.data.encode import Example, pad_token_id
from unlearn.evals.generate import evaluation_mode, generate
from unlearn.scores import Scorer, Scores

GENERATION_BUDGET = 4
"""Writing one token at a time needs far less memory than scoring whole rows: larger batches."""


@dataclass(frozen=True)
class Evaluator:
    """A model under evaluation: what it says about given sequences, and what it writes itself."""

    model: Any
    tokenizer: Any
    batch_tokens: int = 8192
    max_new_tokens: int = 200

    def score(
        self,
        examples: Sequence[Example],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Scores:
        """Score every example; row i, column j is the j-th labelled token of example i, on the CPU.

        Columns hold answers alone, left-aligned: ``attended`` is ``mask``. ``correct``, ``mean``
        and ``variance`` are always there.
        """
        scorer = Scorer.for_model(self.model)
        device = next(self.model.parameters()).device
        found: list[dict[str, Tensor]] = [{}] * len(examples)
        done = 0
        with evaluation_mode(self.model):
            for group in batches_by_length([len(e.input_ids) for e in examples], self.batch_tokens):
                batch = pad([examples[place] for place in group], pad_token_id(self.tokenizer))
                batch = {key: value.to(device) for key, value in batch.items()}
                scores = scorer(self.model, batch, want={"correct", "statistics"})
                for row, place in enumerate(group):
                    mask = scores.mask[row]
                    found[place] = {
                        name: getattr(scores, name)[row][mask].cpu()
                        for name in ("log_probs", "correct", "mean", "variance")
                    }
                done += len(group)
                progress(done, len(examples))
        return _stack(found)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        known: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[str]:
        """Give the greedy answer to each prompt (token ids), as text, in input order."""
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            known=known,
            max_new_tokens=self.max_new_tokens,
            token_budget=GENERATION_BUDGET * self.batch_tokens,
            progress=progress,
        )


def known_start(example: Example, correct: Sequence[bool], prompt: Sequence[int]) -> list[int]:
    """Give the first tokens of the true answer that greedy decoding is known to choose.

    ``correct`` says, per labelled token, whether it was the likeliest. Where the teacher-forced
    prediction is right, greedy decoding writes the same token and stands before the same context;
    so right predictions at the start of an answer need no decoding. As with any two batches of
    different shape, rounding may settle a near-tie differently.
    """
    start = len(prompt)
    if example.input_ids[:start] != list(prompt):
        return []
    hits = iter(correct)
    end = start
    while end < len(example.input_ids) and example.labels[end] != IGNORE and next(hits):
        end += 1
    return example.input_ids[start:end]


def select(scores: Scores, rows: Sequence[int]) -> Scores:
    """Keep some rows of the evaluator's scores, in the given order."""
    index = torch.tensor(rows, dtype=torch.long)
    columns = {name: value for name, value in vars(scores).items() if value is not None}
    return Scores(**{name: value[index] for name, value in columns.items()})


def _stack(rows: Sequence[dict[str, Tensor]]) -> Scores:
    columns = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
        for name in rows[0]
    }
    lengths = torch.tensor([len(row["log_probs"]) for row in rows])
    mask = torch.arange(columns["log_probs"].shape[1]) < lengths[:, None]
    return Scores(mask=mask, attended=mask, **columns)
