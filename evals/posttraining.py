"""The benchmark of post-training: how probable right, wrong and held-out answers are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.data.encode import Example
from unlearn.evals.answers import Evaluator
from unlearn.evals.benchmark import Direction, Metric, Progress, Record, Result
from unlearn.evals.forget_retain import Split, texts
from unlearn.evals.generate import stop_ids, text_of
from unlearn.scores import Scores

ORDER = ("heldout", "pairs", "chosen", "rejected", "text")


@dataclass(frozen=True)
class PostTraining:
    """What the model says about the answers it was trained on, and about others.

    Of pairs: ``chosen_logp`` and ``rejected_logp``, the mean log-probability per token of an answer
    (nats), ``pairs_margin``, the first minus the second, and ``pairs_accuracy``, the share of pairs
    in which the chosen answer has the higher one. Of ``text`` and ``heldout`` rows: ``…_loss``, the
    mean loss per token of a row (nats). All are means over rows. With ``generate`` the model
    answers the prompts of ``asked``, the first of ``heldout``, ``chosen`` and ``text`` that has
    any: ``…_answer_tokens`` is the mean length of its answers, the end token counted, and
    ``…_unfinished`` the share that had not ended after ``max_new_tokens``.
    """

    splits: Mapping[str, Split]
    max_rows: int | None = 400
    generate: bool = True
    max_new_tokens: int = 200
    batch_tokens: int = 8192

    name = "post_training"
    version = "1"

    @property
    def asked(self) -> str | None:
        """Name the split whose prompts the model answers; plain texts ask nothing."""
        found = (name for name in ("heldout", "chosen", "text") if name in self.splits)
        return next((name for name in found if self._asks(name)), None)

    def _asks(self, name: str) -> bool:
        return texts(self.splits[name].rows[0])["question"] is not None

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress = lambda stage, done, total: None,
        weights_hash: str | None = None,
    ) -> Result:
        """Evaluate; ``progress`` is told (stage, rows done, rows in all)."""
        used = {name: split.first(self.max_rows) for name, split in self.splits.items()}
        evaluator = Evaluator(
            model, tokenizer, self.batch_tokens, self.max_new_tokens, weights_hash
        )
        examples = [example for split in used.values() for example in split.examples]
        scores = evaluator.score(
            examples, progress=lambda done, total: progress("scoring", done, total)
        )
        records = _records(used, examples, scores)
        metrics: dict[str, Metric] = {}
        for name in used:
            metrics |= _of_split(name, [r for r in records if r["split"] == name])
        metrics |= _of_pairs(records)
        if self.generate and (asked := self.asked):
            mine = [record for record in records if record["split"] == asked]
            metrics |= self._answered(evaluator, used[asked], mine, progress)
        metrics = {name: metrics[name] for name in sorted(metrics, key=_place)}
        return Result(self.name, self.version, metrics, records, self._settings(used))

    def _answered(
        self, evaluator: Evaluator, split: Split, records: Sequence[Record], progress: Progress
    ) -> dict[str, Metric]:
        """Let the model answer the rows of a split; complete their records."""
        tokenizer, name = evaluator.tokenizer, self.asked
        prompts = [
            split.template.prompt_ids(split.rows[record["row"]], tokenizer) for record in records
        ]
        answers = evaluator.write_tokens(
            prompts, progress=lambda done, total: progress("answering", done, total)
        )
        stops = stop_ids(evaluator.model, tokenizer)
        for record, tokens in zip(records, answers, strict=True):
            ended = bool(tokens) and tokens[-1] in stops
            record["generation"] = text_of(tokenizer, tokens)
            record |= {"answer_tokens": len(tokens), "unfinished": float(not ended)}
        lengths = [float(record["answer_tokens"]) for record in records]
        return {
            f"{name}_answer_tokens": Metric.mean(lengths, "none"),
            f"{name}_unfinished": Metric.mean([r["unfinished"] for r in records], "lower"),
        }

    def _settings(self, used: Mapping[str, Split]) -> dict[str, Any]:
        return {
            "max_rows": self.max_rows,
            "generate": self.generate,
            "max_new_tokens": self.max_new_tokens,
            "rows": {
                name: {"evaluated": len(used[name].rows), "given": len(split.rows)}
                for name, split in self.splits.items()
            },
        }


def _place(metric: str) -> int:
    """Put what is said about one set of rows together; held-out rows come first."""
    return ORDER.index(metric.partition("_")[0])


def _records(
    used: Mapping[str, Split], examples: Sequence[Example], scores: Scores
) -> list[Record]:
    logps = (scores.sequence / scores.num_tokens).tolist()
    counts = [len(split.examples) for split in used.values()]
    names = [name for name, n in zip(used, counts, strict=True) for _ in range(n)]
    return [
        {
            "split": name,
            "row": example.row,
            **texts(used[name].rows[example.row]),
            "logp": logp,
            "num_tokens": tokens,
            "cut": example.cut,
        }
        for name, example, logp, tokens in zip(
            names, examples, logps, scores.num_tokens.tolist(), strict=True
        )
    ]


def _of_split(name: str, records: Sequence[Record]) -> dict[str, Metric]:
    logps = [record["logp"] for record in records]
    if name in ("text", "heldout"):
        return {f"{name}_loss": Metric.mean([-logp for logp in logps], "lower")}
    direction: Direction = "higher" if name == "chosen" else "none"
    return {f"{name}_logp": Metric.mean(logps, direction)}


def _of_pairs(records: Sequence[Record]) -> dict[str, Metric]:
    chosen, rejected = (
        {record["row"]: record["logp"] for record in records if record["split"] == side}
        for side in ("chosen", "rejected")
    )
    margins = [chosen[row] - rejected[row] for row in sorted(chosen.keys() & rejected.keys())]
    if not margins:
        return {}
    won = [float(margin > 0) for margin in margins]
    return {
        "pairs_accuracy": Metric.mean(won, "higher"),
        "pairs_margin": Metric.mean(margins, "higher"),
    }
