"""TOFU: fictitious authors to forget, others to keep, and what is known of the real world.

Every (question, answer variant) is scored once and every question answered once, through
:class:`~unlearn.evals.answers.Evaluator`; all metrics are functions of that. Source: Maini et al.
2024, arXiv:2401.06121; names and definitions as in open-unlearning unless a docstring says
otherwise.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unlearn.data import IGNORE, Row, Template, pad_token_id
from unlearn.data.collate import pad
from unlearn.errors import UserError
from unlearn.evals.answers import Evaluator, known_start
from unlearn.evals.benchmark import Metric, Progress, Record, Result
from unlearn.evals.fluency import clean_probability
from unlearn.evals.membership import gradnorm
from unlearn.evals.metrics import EsVariant
from unlearn.evals.statistics import TruthRatio, mean_with_interval
from unlearn.evals.tofu.compat import OpenUnlearningEvaluator, hides_tokens, tidied
from unlearn.evals.tofu.data import (
    Prompt,
    Sheet,
    check_probes,
    load_blocks,
    load_holdout,
    sheet_of,
)
from unlearn.evals.tofu.records import (
    Reading,
    columns_of,
    epsilon_of,
    metrics_of,
    records_of,
)
from unlearn.scores import Scores


@dataclass(frozen=True)
class TofuOptions:
    """How TOFU is run.

    ``max_rows`` bounds the rows per block: None takes all, as open-unlearning; TOFU's own script
    took 300, and p-values and model utility of the two are not comparable. ``probes`` adds
    paraphrased questions and the jailbreak lead-in, about as much writing again; ``gradnorm`` adds
    an attack that costs a forward and a backward pass per row of the forget and holdout sets.
    ``es`` None is ``exact``, or ``ou`` with ``compat="ou"``, which gives open-unlearning's numbers,
    quirks included (see :mod:`unlearn.evals.tofu.compat`). ``seed`` is that of the bootstrap.
    """

    split: str = "forget10"
    data: str = "locuslab/TOFU"
    holdout: str | None = None
    truth_ratio: TruthRatio = "geometric"
    es: EsVariant | None = None
    compat: Literal["none", "ou"] = "none"
    max_rows: int | None = None
    generate: bool = True
    probes: bool = False
    gradnorm: bool = False
    template: str | None = None
    system_prompt: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    batch_tokens: int = 8192
    max_new_tokens: int = 200
    seed: int = 0

    @property
    def reading(self) -> Reading:
        """Say how numbers are read."""
        es = self.es or ("ou" if self.compat == "ou" else "exact")
        return Reading(self.truth_ratio, es, epsilon_of(self.compat), self.seed)


@dataclass
class Tofu:
    """TOFU on given rows; build it with :meth:`load`."""

    options: TofuOptions
    blocks: dict[str, list[Row]]
    given: dict[str, int]
    notes: list[str] = field(default_factory=list)
    prepared: tuple[Any, Sheet] | None = None

    name = "tofu"
    version = "1"

    @classmethod
    def load(cls, options: TofuOptions, *, offline: bool = False) -> "Tofu":
        """Read the rows of all blocks, and of the holdout set where there is one.

        Raises:
            UserError: a configuration, a column or the named holdout source is missing.
        """
        if options.max_rows is not None and options.max_rows < 2:
            raise UserError(f"max_rows={options.max_rows} is too few", "give 2 or more")
        blocks = load_blocks(options.data, options.split, offline=offline)
        if options.probes:
            check_probes(blocks)
        held, why = load_holdout(options.data, options.split, options.holdout, offline=offline)
        if held:
            blocks["holdout"] = held
        given = {block: len(rows) for block, rows in blocks.items()}
        first = {block: rows[: options.max_rows] for block, rows in blocks.items()}
        return cls(options, first, given, [why] if why else [])

    def prepare(self, tokenizer: Any) -> Sheet:
        """Tokenise everything for one tokenizer; done once.

        Raises:
            UserError: the template does not fit, or a block has no row with an answer.
        """
        if self.prepared is None or self.prepared[0] is not tokenizer:
            options = self.options
            sheet = sheet_of(
                self.blocks,
                tokenizer,
                self.template(tokenizer),
                probes=options.probes,
                satimp=options.reading.es == "satimp",
                second_eos=options.compat == "ou",
            )
            self.prepared = (tokenizer, sheet)
        return self.prepared[1]

    def template(self, tokenizer: Any) -> Template:
        """Give the template that rows are written in."""
        options = self.options
        return Template.for_tokenizer(
            tokenizer, options.template, options.system_prompt, options.template_args
        )

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        progress: Progress = lambda stage, done, total: None,
        weights_hash: str | None = None,
    ) -> Result:
        """Evaluate a model; ``progress`` is told (stage, sequences done, sequences in all).

        With ``weights_hash`` results are kept in the user's cache and found there again.

        Raises:
            UserError: the model gives no finite numbers.
        """
        sheet, options = self.prepare(tokenizer), self.options
        evaluator = self.evaluator(model, tokenizer, weights_hash=weights_hash)
        path = getattr(model.config, "_name_or_path", "")
        evaluator.check_finite(sheet.examples, name=f"'{path}'" if path else "the model")
        scores = evaluator.score(
            sheet.examples, progress=lambda done, total: progress("scoring", done, total)
        )
        require_finite(scores)
        columns = columns_of(scores, self._answers(sheet), options.reading)
        written = self._write(evaluator, sheet, scores, progress) if options.generate else None
        blocks = self.blocks
        if options.compat == "ou":
            blocks = {name: tidied(rows, tokenizer) for name, rows in blocks.items()}
            written = written and [tidied([{"answer": t}], tokenizer)[0]["answer"] for t in written]
        records = records_of(blocks, sheet, columns, written, options.reading)
        if options.gradnorm:
            self._set_gradnorm(model, tokenizer, sheet, records, progress)
        metrics = metrics_of(records, options.reading) | gibberish(records, options.seed)
        return Result(self.name, self.version, metrics, records, self._settings(sheet, tokenizer))

    def evaluator(self, model: Any, tokenizer: Any, *, weights_hash: str | None = None) -> Any:
        """Give what scores and writes: open-unlearning's way where that makes a difference."""
        options = self.options
        sizes = options.batch_tokens, options.max_new_tokens
        if options.compat == "ou" and hides_tokens(tokenizer, self.prepare(tokenizer)):
            return OpenUnlearningEvaluator(model, tokenizer, *sizes)
        return Evaluator(model, tokenizer, *sizes, weights_hash=weights_hash)

    def _set_gradnorm(
        self, model: Any, tokenizer: Any, sheet: Sheet, records: list[Record], progress: Progress
    ) -> None:
        """Set ``mia_gradnorm`` on forget and holdout records."""
        found = {(record["split"], record["row"]): record for record in records}
        if "holdout" not in self.blocks:
            return
        items = zip(sheet.items, sheet.examples, strict=True)
        chosen = [
            (found[item.split, item.row], example)
            for item, example in items
            if item.kind == "answer" and item.split in ("forget", "holdout")
        ]
        device, pad_id = next(model.parameters()).device, pad_token_id(tokenizer)

        def batches() -> Iterator[dict[str, Any]]:
            for done, (_, example) in enumerate(chosen, start=1):
                progress("gradient norms", done, len(chosen))
                yield {name: part.to(device) for name, part in pad([example], pad_id).items()}

        for (record, _), norm in zip(chosen, gradnorm(model, batches()), strict=True):
            record["mia_gradnorm"] = norm

    def _answers(self, sheet: Sheet) -> list[str]:
        """Give the dataset's answer for every scored sequence (only attacks read it)."""
        return [str(self.blocks[item.split][item.row]["answer"]) for item in sheet.items]

    def _write(self, evaluator: Any, sheet: Sheet, scores: Scores, progress: Progress) -> list[str]:
        places: dict[tuple[str, int, str], int] = {
            (item.split, item.row, item.kind): place for place, item in enumerate(sheet.items)
        }
        known = [
            _known(prompt, sheet, scores, places.get((prompt.split, prompt.row, prompt.kind)))
            for prompt in sheet.prompts
        ]
        written: list[str] = evaluator.write(
            [prompt.ids for prompt in sheet.prompts],
            known=known,
            progress=lambda done, total: progress("answering", done, total),
        )
        return written

    def _settings(self, sheet: Sheet, tokenizer: Any) -> dict[str, Any]:
        options = self.options
        cut = sum(example.cut > 0 for example in sheet.examples)
        return {
            **{k: v for k, v in vars(options).items() if k != "template_args"},
            "template_args": dict(options.template_args),
            "es": options.reading.es,
            "template_fingerprint": self.template(tokenizer).fingerprint(),
            "rows": {
                block: {"evaluated": len(rows), "given": self.given[block]}
                for block, rows in self.blocks.items()
            },
            "n_skipped": {block: len(sheet.skipped.get(block, ())) for block in self.blocks},
            "tokens": {
                "scored": sum(len(example.input_ids) for example in sheet.examples),
                "labelled": sum(
                    label != IGNORE for example in sheet.examples for label in example.labels
                ),
                "sequences": len(sheet.examples),
                "prompts": len(sheet.prompts) if options.generate else 0,
            },
            "data_sha256": {block: hash_rows(rows) for block, rows in self.blocks.items()},
            "notes": self.notes + ([f"{cut} texts were cut to fit the model"] if cut else []),
        }


def hash_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Identify rows as they were read (sha256)."""
    text = json.dumps([dict(row) for row in rows], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def require_finite(scores: Scores) -> None:
    """Refuse scores that are not numbers: a mean that leaves them out would look like a result.

    Raises:
        UserError: a log-probability is not finite.
    """
    bad = int((~scores.log_probs.isfinite()).any(-1).sum())
    if bad:
        raise UserError(
            f"the model gives no finite log-probabilities for {bad} of {len(scores.mask)} texts",
            "its weights may hold NaN, or overflow in this precision: try --dtype float32",
        )


def gibberish(records: Sequence[Record], seed: int) -> dict[str, Metric]:
    """Set ``clean`` on forget records and give its mean, where the classifier is at hand."""
    written = [r for r in records if r["split"] == "forget" and r.get("generation") is not None]
    values = clean_probability([r["generation"] for r in written]) if written else None
    if not values:
        return {}
    for record, value in zip(written, values, strict=True):
        record["clean"] = value
    metric = Metric.mean(values, "higher")
    return {"forget_gibberish": mean_with_interval(metric, values, seed=seed)}


def _known(prompt: Prompt, sheet: Sheet, scores: Scores, place: int | None) -> list[int]:
    """Give the start of the answer that the scores already tell."""
    if place is None or scores.correct is None:
        return []
    hits = scores.correct[place][scores.mask[place]].tolist()
    return known_start(sheet.examples[place], hits, prompt.ids)
