"""Time the one-pass evaluator against the usual order of evaluation: one pass per metric.

    python scripts/bench_eval.py --model ../shared/models/tofu-tiny-target \
        --data ../shared/data/tofu [--rows 40] [--repeats 3]

Both compute the same values of the same rows on the same model, in turn and in one process; ratios
are medians over repeats. Without ``--data`` the rows are those of the invented people that ship
with the package, without ``--model`` the model is the one that knows them.

``plain`` is the order of open-unlearning with all its TOFU metrics on: probability, extraction
strength, exact memorisation and four membership attacks each make a pass of their own, the
paraphrase and every perturbed answer too; batches are fixed, in the order of the data, with padding
and full logits; ``generate`` answers each split with up to 200 new tokens. ROUGE and other work on
text is left out of both. ``ours`` is :class:`unlearn.evals.answers.Evaluator`, and between the two
each ingredient is added in turn:

- ``deduped``: the same batches, but every sequence goes through the model once;
- ``lengths``: rows of similar length together, only labelled positions reach the vocabulary head,
  and generation in large batches that finished rows leave;
- ``shared``: what rows begin with is computed once (needs plain causal attention);
- ``ours``: answers start with what the scores already tell;
- ``again``: the same evaluation with everything stored.

What bounds it: matrix products over the distinct tokens of all rows (half of the tokens of TOFU's
perturbed blocks), two thirds of our scoring time on a CPU; then the tokens that are written one
after the other. A model that still knows the answers writes next to none; one that has unlearned
them writes all of them, in as many steps as the longest takes. Left out of ``plain`` are passes
that open-unlearning repeats without need (ROUGE of the paraphrased and perturbed answers writes the
same answers six times more), so its own order is slower still.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from unlearn.data import Template, encode, load_rows, pad_token_id
from unlearn.data.collate import pad
from unlearn.data.encode import Example
from unlearn.data.people import demo_folder, people
from unlearn.evals.answers import Evaluator, known_start, select
from unlearn.evals.generate import text_of
from unlearn.evals.metrics import exact_memorization, extraction_strength, probability
from unlearn.models import load_model, load_tokenizer, weights_hash
from unlearn.scores import Scores, vocabulary_statistics

TOFU = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "ra": "real_authors_perturbed",
    "wf": "world_facts_perturbed",
    "holdout": "retain90",
}
"""The holdout set is not in every copy of TOFU; rows of its size take its place."""
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
ON_ANSWERS = {
    "forget": ("prob", "extraction_strength", "exact_memorization", *ATTACKS),
    "retain": ("prob",),
    "ra": ("prob",),
    "wf": ("prob",),
    "holdout": ATTACKS,
}
SHARE = 0.4
VARIANTS = ("plain", "deduped", "lengths", "shared", "ours", "again")

Values = dict[tuple[str, str, str], list[float]]


@dataclass(frozen=True)
class Job:
    """What is evaluated: sequences by (block, kind), and by block the prompts to answer."""

    model: Any
    tokenizer: Any
    sequences: dict[tuple[str, str], list[Example]]
    texts: dict[str, list[str]]
    prompts: dict[str, list[list[int]]]
    batch: int
    new_tokens: int

    @property
    def passes(self) -> Iterator[tuple[str, str, str]]:
        """Give (block, kind, metric) of every pass of the plain order."""
        for block, kind in self.sequences:
            for metric in ON_ANSWERS[block] if kind == "answer" else ("prob",):
                yield block, kind, metric

    @property
    def asked(self) -> list[tuple[str, int]]:
        """Give (block, row) of every prompt."""
        return [(block, row) for block, found in self.prompts.items() for row in range(len(found))]


@dataclass
class Outcome:
    """Seconds of scoring and writing, every value per row, every answer."""

    scoring: float
    writing: float
    values: Values
    answers: list[str]

    @property
    def seconds(self) -> float:
        """Give the time of both."""
        return self.scoring + self.writing


def main() -> None:
    """Run all variants in turn and print one JSON object."""
    options = _options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    job = _job(options)
    _measure(_first(job, 2), "plain")  # warm up
    runs: dict[str, list[Outcome]] = {variant: [] for variant in VARIANTS}
    for repeat in range(options.repeats):
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.dict(os.environ, UNLEARN_CACHE=folder),
        ):
            for variant in VARIANTS:
                found = _measure(job, variant)
                runs[variant].append(found)
                times = f"{found.scoring:.1f} s scoring, {found.writing:.1f} s writing"
                print(f"{repeat + 1}/{options.repeats} {variant}: {times}", file=sys.stderr)
    print(json.dumps(_summary(job, runs), indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(demo_folder() / "target"))
    parser.add_argument("--data", type=Path, help="folder with TOFU; else people are invented")
    parser.add_argument("--rows", type=int, default=40, help="first rows of every block")
    parser.add_argument("--system-prompt", help="written before every question")
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch in the plain order")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    return parser.parse_args()


def _job(options: argparse.Namespace) -> Job:
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    template = Template.for_tokenizer(tokenizer)
    blocks = _blocks(options)
    sequences, texts, prompts = {}, {}, {}
    for block, rows in blocks.items():
        for kind, answers in _answers(rows, block):
            asked = [
                {"question": row["question"], "answer": answer}
                for row, answer in zip(rows, answers, strict=True)
            ]
            sequences[block, kind] = encode(
                asked, tokenizer, template, max_length=2048, source=block
            )
        texts[block] = [row["answer"] for row in rows]
        if block != "holdout":
            prompts[block] = [template.prompt_ids(row, tokenizer) for row in rows]
    return Job(model, tokenizer, sequences, texts, prompts, options.batch, options.new_tokens)


def _first(job: Job, rows: int) -> Job:
    """Keep the first rows of every block."""
    return replace(
        job,
        sequences={key: found[:rows] for key, found in job.sequences.items()},
        texts={block: found[:rows] for block, found in job.texts.items()},
        prompts={block: found[:rows] for block, found in job.prompts.items()},
    )


def _blocks(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    if options.data:
        found = {name: load_rows(str(options.data / f"{file}.json")) for name, file in TOFU.items()}
        found["holdout"] = found["holdout"][-len(found["forget"]) :]
    else:
        made = people()
        found = {"forget": made.forget, "retain": made.retain, "holdout": made.holdout}
    before = f"{options.system_prompt} " if options.system_prompt else ""
    return {
        name: [{**row, "question": before + row["question"]} for row in rows[: options.rows]]
        for name, rows in found.items()
    }


def _answers(rows: Sequence[dict[str, Any]], block: str) -> Iterator[tuple[str, list[str]]]:
    yield "answer", [row["answer"] for row in rows]
    if block == "holdout":
        return
    if "paraphrased_answer" in rows[0]:
        yield "paraphrase", [row["paraphrased_answer"] for row in rows]
    for place in range(len(rows[0].get("perturbed_answer", ()))):
        yield f"perturbed {place}", [row["perturbed_answer"][place] for row in rows]


def _measure(job: Job, variant: str) -> Outcome:
    if variant in ("plain", "deduped"):
        start = time.perf_counter()
        values = _plain_values(job) if variant == "plain" else _deduped_values(job)
        scored = time.perf_counter()
        answers = _plain_answers(job)
        return Outcome(scored - start, time.perf_counter() - scored, values, answers)
    if variant == "lengths":
        with mock.patch("unlearn.scoring.can_pack", return_value=False):
            return _ours(job, starts=False)
    return _ours(job, starts=variant != "shared", stored=variant in ("ours", "again"))


def _ours(job: Job, *, starts: bool, stored: bool = False) -> Outcome:
    start = time.perf_counter()
    weights = weights_hash(job.model) if stored else None
    evaluator = Evaluator(
        job.model, job.tokenizer, max_new_tokens=job.new_tokens, weights_hash=weights
    )
    order = list(job.sequences)
    scores = evaluator.score([row for key in order for row in job.sequences[key]])
    begins, first = {}, 0
    for key in order:
        begins[key], first = first, first + len(job.sequences[key])
    values = {
        (block, kind, metric): _value(
            metric, select(scores, _places(begins, block, kind, job)), job.texts[block]
        )
        for block, kind, metric in job.passes
    }
    scored = time.perf_counter()
    known = None
    if starts:
        known = []
        for block, row in job.asked:
            place = begins[block, "answer"] + row
            hits = scores.correct[place][scores.mask[place]].tolist()
            known.append(
                known_start(job.sequences[block, "answer"][row], hits, job.prompts[block][row])
            )
    answers = evaluator.write([job.prompts[b][row] for b, row in job.asked], known=known)
    return Outcome(scored - start, time.perf_counter() - scored, values, answers)


def _places(begins: dict[tuple[str, str], int], block: str, kind: str, job: Job) -> list[int]:
    begin = begins[block, kind]
    return list(range(begin, begin + len(job.sequences[block, kind])))


def _value(metric: str, scores: Scores, texts: Sequence[str]) -> list[float]:
    """Give a metric's value per row."""
    loss = -scores.sequence / scores.num_tokens
    if metric in ("prob", "loss"):
        return (loss if metric == "loss" else probability(scores)).tolist()
    if metric == "zlib":
        sizes = [len(zlib.compress(text.encode())) for text in texts]
        return (loss / torch.tensor(sizes)).tolist()
    if metric in ("extraction_strength", "exact_memorization"):
        read = extraction_strength if metric == "extraction_strength" else exact_memorization
        return read(scores.correct, scores.mask).tolist()
    tokens = scores.log_probs
    if metric == "min_k_plus_plus":
        tokens = (tokens - scores.mean) / scores.variance.clamp_min(1e-6).sqrt()
    rows = [row[mask][:-1] for row, mask in zip(tokens, scores.mask, strict=True)]
    return [float(-r.sort().values[: max(1, int(SHARE * len(r)))].mean()) for r in rows]


@torch.no_grad()
def _plain_scores(job: Job, rows: Sequence[Example], want: Sequence[str]) -> Scores:
    """Score rows in batches in their order, with padding and full logits."""
    parts = []
    for start in range(0, len(rows), job.batch):
        batch = pad(rows[start : start + job.batch], pad_token_id(job.tokenizer))
        batch = {key: value.to(job.model.device) for key, value in batch.items()}
        logits = job.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits[:, :-1]
        logits = logits.float()
        labels = batch["labels"][:, 1:]
        mask = labels != -100
        chosen = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        found = {"log_probs": chosen[mask]}
        if "correct" in want:
            found["correct"] = (logits.argmax(-1) == labels)[mask]
        if "statistics" in want:
            statistics = vocabulary_statistics(logits[mask])
            found |= {"mean": statistics.mean, "variance": statistics.variance}
        parts.append((mask.sum(-1), found))
    lengths = torch.cat([counts for counts, _ in parts]).cpu()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    columns = {}
    for name in parts[0][1]:
        values = torch.cat([found[name] for _, found in parts]).cpu()
        columns[name] = torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)
    return Scores(mask=mask, attended=mask, **columns)


def _plain_values(job: Job) -> Values:
    wants = {
        "extraction_strength": ["correct"],
        "exact_memorization": ["correct"],
        "min_k_plus_plus": ["statistics"],
    }
    values = {}
    for block, kind, metric in job.passes:
        scores = _plain_scores(job, job.sequences[block, kind], wants.get(metric, ()))
        values[block, kind, metric] = _value(metric, scores, job.texts[block])
    return values


def _deduped_values(job: Job) -> Values:
    scores = {
        key: _plain_scores(job, rows, ["correct", "statistics"])
        for key, rows in job.sequences.items()
    }
    return {
        (block, kind, metric): _value(metric, scores[block, kind], job.texts[block])
        for block, kind, metric in job.passes
    }


@torch.no_grad()
def _plain_answers(job: Job) -> list[str]:
    """Answer each split with ``generate``, in fixed batches in the order of the data."""
    found = []
    pad_id = pad_token_id(job.tokenizer)
    for prompts in job.prompts.values():
        for start in range(0, len(prompts), job.batch):
            rows = [Example(ids, ids, len(ids), 0) for ids in prompts[start : start + job.batch]]
            batch = pad(rows, pad_id, side="left")
            given = {
                key: batch[key].to(job.model.device) for key in ("input_ids", "attention_mask")
            }
            whole = job.model.generate(
                **given, do_sample=False, max_new_tokens=job.new_tokens, pad_token_id=pad_id
            )
            new = whole[:, batch["input_ids"].shape[1] :].tolist()
            found += [text_of(job.tokenizer, ids) for ids in new]
    return found


def _summary(job: Job, runs: dict[str, list[Outcome]]) -> dict[str, Any]:
    def ratio(one: str, two: str, part: Callable[[Outcome], float]) -> float:
        pairs = zip(runs[one], runs[two], strict=True)
        return round(statistics.median(part(a) / part(b) for a, b in pairs), 2)

    first, last = runs["plain"][0], runs["ours"][0]
    lengths = [len(row.input_ids) for rows in job.sequences.values() for row in rows]
    return {
        "speedup": ratio("plain", "ours", lambda run: run.seconds),
        "speedup_scoring": ratio("plain", "ours", lambda run: run.scoring),
        "speedup_writing": ratio("plain", "ours", lambda run: run.writing),
        "speedup_when_stored": ratio("plain", "again", lambda run: run.seconds),
        "each_ingredient": {
            f"{before} -> {after}": {
                "scoring": ratio(before, after, lambda run: run.scoring),
                "writing": ratio(before, after, lambda run: run.writing),
            }
            for before, after in pairwise(VARIANTS[:-1])
        },
        "seconds": {
            name: {
                "scoring": round(statistics.median(run.scoring for run in found), 2),
                "writing": round(statistics.median(run.writing for run in found), 2),
            }
            for name, found in runs.items()
        },
        "largest_difference": {
            name: _difference(first.values, found[0].values) for name, found in runs.items()
        },
        "answers_that_differ": {
            name: sum(a != b for a, b in zip(first.answers, found[0].answers, strict=True))
            for name, found in runs.items()
        },
        "passes": len(list(job.passes)),
        "sequences": len(lengths),
        "tokens": sum(lengths),
        "prompts": len(last.answers),
        "repeats": len(runs["plain"]),
    }


def _difference(one: Values, two: Values) -> float:
    pairs = [pair for key in one for pair in zip(one[key], two[key], strict=True)]
    return max(abs(a - b) for a, b in pairs if not (a != a and b != b))


if __name__ == "__main__":
    main()
