"""The benchmark of every run: what is left of the forget set, what was kept of the retain set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unlearn.data.collate import IGNORE, batches_by_length, pad
from unlearn.data.encode import Example, pad_token_id
from unlearn.data.rows import row_kind
from unlearn.data.templates import Template
from unlearn.evals.benchmark import Direction, Metric, Progress, Record, Result
from unlearn.evals.generate import evaluation_mode, generate
from unlearn.evals.metrics import extraction_strength, probability, rouge_l_recall
from unlearn.scores import Scorer, Scores

MEASURES = {
    "Q_A_Prob": "prob",
    "Q_A_ROUGE": "rouge_l_recall",
    "extraction_strength": "extraction_strength",
}
"""Metric name without its split -> the field of the records it is the mean of."""

GENERATION_BUDGET = 4
"""Writing one token at a time needs far less memory than scoring whole rows: larger batches."""


@dataclass(frozen=True)
class Split:
    """Rows, the same rows as tokens, and how they were written."""

    rows: Sequence[Mapping[str, Any]]
    examples: Sequence[Example]
    template: Template

    def first(self, max_rows: int | None) -> "Split":
        """Keep the first rows only; None keeps all."""
        rows = self.rows[:max_rows]
        kept = [example for example in self.examples if example.row < len(rows)]
        return Split(rows, kept, self.template)


@dataclass(frozen=True)
class ForgetRetain:
    """How much of the forget set is still there and how much of the retain set was kept.

    Per split: ``Q_A_Prob``, ``Q_A_ROUGE`` and ``extraction_strength`` (see
    :mod:`unlearn.evals.metrics`), from one teacher-forced pass and one generation pass. Each metric
    is a mean over examples; a text that was cut into windows counts once per window. Rows of plain
    text have no question, so ROUGE leaves them out.
    """

    forget: Split
    retain: Split | None = None
    max_rows: int | None = 400
    generate: bool = True
    max_new_tokens: int = 200
    batch_tokens: int = 8192

    name = "forget_retain"
    version = "1"

    @property
    def splits(self) -> dict[str, Split]:
        """Give the splits as they are evaluated, by name."""
        return {name: split.first(self.max_rows) for name, split in self._given().items()}

    def run(
        self, model: Any, tokenizer: Any, *, progress: Progress = lambda stage, done, total: None
    ) -> Result:
        """Evaluate; ``progress`` is told (stage, rows done, rows in all)."""
        metrics: dict[str, Metric] = {}
        records: list[Record] = []
        with evaluation_mode(model):
            scorer = Scorer.for_model(model)
            for name, split in self.splits.items():
                found = self._records(name, split, model, tokenizer, scorer, progress)
                metrics |= _metrics(name, found)
                records += found
        return Result(self.name, self.version, metrics, records, self._settings())

    def _records(
        self,
        name: str,
        split: Split,
        model: Any,
        tokenizer: Any,
        scorer: Scorer,
        progress: Progress,
    ) -> list[Record]:
        readings = score_examples(
            scorer,
            model,
            split.examples,
            pad_id=pad_token_id(tokenizer),
            batch_tokens=self.batch_tokens,
            progress=lambda done, total: progress(f"{name}: scoring", done, total),
        )
        records = [
            {"split": name, "row": example.row, **_texts(split.rows[example.row]), **reading.record}
            for example, reading in zip(split.examples, readings, strict=True)
        ]
        asked = [place for place, record in enumerate(records) if record["question"] is not None]
        if not self.generate or not asked:
            return records
        prompts = [_prompt(split, place, tokenizer) for place in asked]
        answers = generate(
            model,
            tokenizer,
            prompts,
            known=[
                _known(split.examples[place], readings[place], prompt)
                for place, prompt in zip(asked, prompts, strict=True)
            ],
            max_new_tokens=self.max_new_tokens,
            token_budget=GENERATION_BUDGET * self.batch_tokens,
            progress=lambda done, total: progress(f"{name}: answering", done, total),
        )
        for place, answer in zip(asked, answers, strict=True):
            recall = rouge_l_recall(records[place]["answer"], answer)
            records[place] |= {"generation": answer, "rouge_l_recall": recall}
        return records

    def _settings(self) -> dict[str, Any]:
        given, used = self._given(), self.splits
        return {
            "max_rows": self.max_rows,
            "generate": self.generate,
            "max_new_tokens": self.max_new_tokens,
            "rows": {
                name: {"evaluated": len(used[name].rows), "given": len(split.rows)}
                for name, split in given.items()
            },
        }

    def _given(self) -> dict[str, Split]:
        splits = {"forget": self.forget, "retain": self.retain}
        return {name: split for name, split in splits.items() if split is not None}


@dataclass(frozen=True)
class Reading:
    """What the teacher-forced pass says about one example.

    ``hits`` has one entry per token: whether it is labelled and was the likeliest next token.
    """

    record: Record
    hits: list[bool]


def score_examples(
    scorer: Scorer,
    model: Any,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reading]:
    """Score every example once, in batches of similar length; readings come in input order."""
    found: list[Reading | None] = [None] * len(examples)
    device = next(model.parameters()).device
    done = 0
    with evaluation_mode(model):
        for group in batches_by_length([len(e.input_ids) for e in examples], batch_tokens):
            batch = pad([examples[place] for place in group], pad_id)
            batch = {key: value.to(device) for key, value in batch.items()}
            scores = scorer(model, batch, want={"correct"})
            for place, reading in zip(group, _readings(scores), strict=True):
                found[place] = reading
            done += len(group)
            progress(done, len(examples))
    return [reading for reading in found if reading is not None]


def _readings(scores: Scores) -> Iterator[Reading]:
    assert scores.correct is not None
    columns = {
        "prob": probability(scores),
        "avg_loss": -scores.sequence / scores.num_tokens,
        "num_tokens": scores.num_tokens,
        "extraction_strength": extraction_strength(scores.correct, scores.mask),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    # the prediction made at t is about token t+1
    hits = torch.nn.functional.pad(scores.correct, (1, 0))[:, :-1].tolist()
    for values, row_hits in zip(rows, hits, strict=True):
        record = dict(zip(columns, values, strict=True))
        if record["num_tokens"] < 2:  # nothing but the end of the answer: nothing to extract
            record["extraction_strength"] = None
        yield Reading(record, row_hits)


def _metrics(split: str, records: Sequence[Record]) -> dict[str, Metric]:
    direction: Direction = "lower" if split == "forget" else "higher"
    columns = {
        f"{split}_{name}": [r[key] for r in records if r.get(key) is not None]
        for name, key in MEASURES.items()
    }
    return {name: Metric.mean(column, direction) for name, column in columns.items() if column}


def _texts(row: Mapping[str, Any]) -> dict[str, str | None]:
    """Give the question and the true answer of a row, as the dataset has them."""
    kind = row_kind(row)
    if kind == "qa":
        return {"question": row["question"], "answer": row["answer"]}
    if kind == "completion":
        return {"question": row["prompt"], "answer": row["completion"]}
    if kind == "text":
        return {"question": None, "answer": row["text"]}
    turns = row["messages"]
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    asked = [turn["content"] for turn in turns[:last] if turn["role"] == "user"]
    return {"question": asked[-1] if asked else "", "answer": turns[last]["content"]}


def _prompt(split: Split, place: int, tokenizer: Any) -> list[int]:
    """Tokenise the prompt of one example on its own.

    Cut from the whole text, its last token could be one that merged with the answer and gives the
    answer's beginning away.
    """
    example = split.examples[place]
    return split.template.prompt_ids(split.rows[example.row], tokenizer)


def _known(example: Example, reading: Reading, prompt: Sequence[int]) -> list[int]:
    """Give the first tokens of the true answer that greedy decoding is known to choose.

    Where the teacher-forced prediction is right, greedy decoding writes the same token and stands
    before the same context; so right predictions at the start of an answer need no decoding. As
    with any two batches of different shape, rounding may settle a near-tie differently.
    """
    start = len(prompt)
    if example.input_ids[:start] != list(prompt):
        return []
    end = start
    while end < len(example.input_ids) and example.labels[end] != IGNORE and reading.hits[end]:
        end += 1
    return example.input_ids[start:end]
