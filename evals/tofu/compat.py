"""What open-unlearning computes differently, reproduced for ``--compat ou``.

Reproduced here and in the modules named:

- every token after the prompt is labelled, and EOS is appended unless it is the last one, so chat
  templates that write something after the end of a turn (Qwen) get a second EOS
  (:mod:`unlearn.evals.tofu.data`);
- tokens equal to the padding token are hidden from attention, which hides every turn's end inside
  the prompt where a model pads with EOS (Llama 3 chat; open-unlearning issue 128);
- 1e-10 in the denominators of truth ratio and normalised probability, extraction strength 1/n where
  the last prediction is wrong (:mod:`unlearn.evals.tofu.records`);
- ``clean_up_tokenization_spaces``: spaces before punctuation are removed from written and true
  answers before ROUGE.

Not reproduced: bfloat16 weights (choose them with ``--dtype``) and log-softmax in bfloat16; batches
in dataset order, whose rounding settles near-ties of greedy decoding its own way; a true answer
that repeats the whole prompt, which open-unlearning deletes from it; membership scores of 0 for
empty answers, which are left out; ``max_length`` 512 on its chat-less path, which no TOFU text
reaches; dropout during the gradient norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from unlearn.data import Example, Row, pad_token_id
from unlearn.data.collate import batches_by_length, pad
from unlearn.evals.answers import GENERATION_BUDGET, Evaluator
from unlearn.evals.generate import evaluation_mode, stop_ids
from unlearn.evals.tofu.data import Sheet
from unlearn.scores import Scores


def hides_tokens(tokenizer: Any, sheet: Sheet) -> bool:
    """Say whether open-unlearning's attention mask would hide tokens of these texts."""
    hidden = pad_token_id(tokenizer)
    return any(hidden in one.input_ids[:-1] for one in sheet.examples)


def tidied(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """Remove spaces before punctuation from texts, as decoding with clean-up does."""
    clean = tokenizer.clean_up_tokenization
    return [
        {
            name: clean(value).strip()
            if name.endswith("answer") and isinstance(value, str)
            else value
            for name, value in row.items()
        }
        for row in rows
    ]


@dataclass(frozen=True)
class OpenUnlearningEvaluator:
    """Scores and writes with every padding token hidden from attention, real ones included.

    Positions count the hidden tokens while scoring and leave them out while writing, as in
    open-unlearning's calls of transformers. Slower than
    :class:`~unlearn.evals.answers.Evaluator`: full logits, no packing.
    """

    model: Any
    tokenizer: Any
    batch_tokens: int = 8192
    max_new_tokens: int = 200

    def check_finite(self, examples: Sequence[Example], *, name: str = "the model") -> None:
        """Try the shortest row before the long work starts.

        Raises:
            UserError: a score is NaN or infinite.
        """
        evaluator = Evaluator(self.model, self.tokenizer, self.batch_tokens)
        evaluator.check_finite(examples, name=name)

    def score(
        self,
        examples: Sequence[Example],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Scores:
        """Score every example; layout as in ``Evaluator.score``."""
        pad_id, device = pad_token_id(self.tokenizer), next(self.model.parameters()).device
        found: list[dict[str, torch.Tensor]] = [{}] * len(examples)
        done = 0
        with evaluation_mode(self.model):
            for group in batches_by_length([len(e.input_ids) for e in examples], self.batch_tokens):
                batch = pad([examples[place] for place in group], pad_id)
                batch = {name: value.to(device) for name, value in batch.items()}
                visible = batch["input_ids"] != pad_id
                logits = self.model(input_ids=batch["input_ids"], attention_mask=visible).logits
                scores = Scores.from_logits(logits, batch["labels"], visible, statistics=True)
                for row, place in enumerate(group):
                    found[place] = _row(scores, row)
                done += len(group)
                progress(done, len(examples))
        return _stacked(found)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        known: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[str]:
        """Give the greedy answer to each prompt; ``known`` is not used, so nothing is assumed."""
        lengths = [len(prompt) + self.max_new_tokens for prompt in prompts]
        texts, done = [""] * len(prompts), 0
        with evaluation_mode(self.model):
            for group in batches_by_length(lengths, GENERATION_BUDGET * self.batch_tokens):
                answers = self._generate([list(prompts[place]) for place in group])
                for place, text in zip(group, answers, strict=True):
                    texts[place] = text
                done += len(group)
                progress(done, len(prompts))
        return texts

    def _generate(self, prompts: Sequence[list[int]]) -> list[str]:
        pad_id, device = pad_token_id(self.tokenizer), next(self.model.parameters()).device
        examples = [Example(ids, ids, len(ids), row) for row, ids in enumerate(prompts)]
        ids = pad(examples, pad_id, side="left")["input_ids"].to(device)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=pad_id,
            eos_token_id=sorted(stop_ids(self.model, self.tokenizer)),
        )
        output = self.model.generate(
            ids, attention_mask=(ids != pad_id).long(), generation_config=settings
        )
        new = output[:, ids.shape[1] :].tolist()
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _row(scores: Scores, row: int) -> dict[str, torch.Tensor]:
    mask = scores.mask[row]
    columns = {
        "log_probs": scores.log_probs,
        "correct": scores.correct,
        "mean": scores.mean,
        "variance": scores.variance,
    }
    return {name: value[row][mask].cpu() for name, value in columns.items() if value is not None}


def _stacked(rows: Sequence[dict[str, torch.Tensor]]) -> Scores:
    columns = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
        for name in rows[0]
    }
    lengths = torch.tensor([len(row["log_probs"]) for row in rows])
    mask = torch.arange(columns["log_probs"].shape[1]) < lengths[:, None]
    return Scores(mask=mask, attended=mask, **columns)
