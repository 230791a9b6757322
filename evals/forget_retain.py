"""The benchmark of every run: what is left of the forget set, what was kept of the retain set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.data.encode import Example
from unlearn.data.rows import row_kind
from unlearn.data.templates import Template
from unlearn.evals.answers import Evaluator, known_start
from unlearn.evals.benchmark import Direction, Metric, Progress, Record, Result
from unlearn.evals.metrics import extraction_strength, probability, rouge_l_recall
from unlearn.scores import Scores

MEASURES = {
    "Q_A_Prob": "prob",
    "Q_A_ROUGE": "rouge_l_recall",
    "extraction_strength": "extraction_strength",
}
"""Metric name without its split -> the field of the records it is the mean of."""


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
    :mod:`unlearn.evals.metrics`), from one teacher-forced pass and one generation pass over both
    splits. Each metric
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
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress = lambda stage, done, total: None,
        weights_hash: str | None = None,
    ) -> Result:
        """Evaluate; ``progress`` is told (stage, rows done, rows in all).

        ``weights_hash`` of this model lets its results be kept and found again.
        """
        splits = self.splits
        evaluator = Evaluator(
            model, tokenizer, self.batch_tokens, self.max_new_tokens, weights_hash
        )
        named = " and ".join(splits)
        examples = [example for split in splits.values() for example in split.examples]
        scores = evaluator.score(
            examples, progress=lambda done, total: progress(f"{named}: scoring", done, total)
        )
        records = [
            {"split": name, "row": example.row, **texts(split.rows[example.row])}
            for name, split in splits.items()
            for example in split.examples
        ]
        for record, read in zip(records, _readings(scores), strict=True):
            record |= read
        if self.generate:
            self._answer(
                evaluator,
                examples,
                scores,
                records,
                lambda done, total: progress(f"{named}: answering", done, total),
            )
        metrics: dict[str, Metric] = {}
        for name in splits:
            metrics |= _metrics(name, [record for record in records if record["split"] == name])
        return Result(self.name, self.version, metrics, records, self._settings())

    def _answer(
        self,
        evaluator: Evaluator,
        examples: Sequence[Example],
        scores: Scores,
        records: Sequence[Record],
        progress: Callable[[int, int], None],
    ) -> None:
        """Let the model answer every row that has a question; complete its record."""
        asked = [place for place, record in enumerate(records) if record["question"] is not None]
        prompts = [self._prompt(records[place], evaluator.tokenizer) for place in asked]
        known = [
            known_start(examples[place], _hits(scores, place), prompt)
            for place, prompt in zip(asked, prompts, strict=True)
        ]
        answers = evaluator.write(prompts, known=known, progress=progress)
        for place, answer in zip(asked, answers, strict=True):
            recall = rouge_l_recall(records[place]["answer"], answer)
            records[place].update(generation=answer, rouge_l_recall=recall)

    def _prompt(self, record: Record, tokenizer: Any) -> list[int]:
        """Tokenise the prompt of one record on its own.

        Cut from the whole text, its last token could be one that merged with the answer and gives
        the answer's beginning away.
        """
        split = self._given()[record["split"]]
        return split.template.prompt_ids(split.rows[record["row"]], tokenizer)

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


def _readings(scores: Scores) -> list[Record]:
    """Give what the teacher-forced pass says about each row."""
    assert scores.correct is not None
    columns = {
        "prob": probability(scores).tolist(),
        "avg_loss": (-scores.sequence / scores.num_tokens).tolist(),
        "num_tokens": scores.num_tokens.tolist(),
        "extraction_strength": extraction_strength(scores.correct, scores.mask).tolist(),
    }
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for record in records:
        if record["num_tokens"] < 2:  # nothing but the end of the answer: nothing to extract
            record["extraction_strength"] = None
    return records


def _hits(scores: Scores, row: int) -> list[bool]:
    """Tell, per labelled token of a row, whether it was the likeliest."""
    assert scores.correct is not None
    return [bool(hit) for hit in scores.correct[row][scores.mask[row]].tolist()]


def _metrics(split: str, records: Sequence[Record]) -> dict[str, Metric]:
    direction: Direction = "lower" if split == "forget" else "higher"
    columns = {
        f"{split}_{name}": [r[key] for r in records if r.get(key) is not None]
        for name, key in MEASURES.items()
    }
    return {name: Metric.mean(column, direction) for name, column in columns.items() if column}


def texts(row: Mapping[str, Any]) -> dict[str, str | None]:
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
