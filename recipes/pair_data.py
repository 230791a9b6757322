"""Pairs to post-train on, written to files: from judged traces, or by two models."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unlearn import models
from unlearn.data import Template
from unlearn.data.ladder import EMPTY, ENDLESS, SAME, check_different, no_pair_left
from unlearn.data.rows import Row
from unlearn.data.sources import load_any_rows
from unlearn.data.traces import PROBLEM, How, build_pairs
from unlearn.errors import UserError
from unlearn.evals.answers import Evaluator
from unlearn.evals.generate import stop_ids, text_of
from unlearn.runs import staged, write_json

Progress = Callable[[str, int, int], None]


def write_pairs(
    source: str,
    out: Path,
    how: How,
    *,
    against: Sequence[str] = (),
    tokenizer: models.ModelSource | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Write ``pairs.jsonl``, ``first.jsonl`` and ``made.json`` into a new folder; give the counts.

    ``against`` are sources of evaluation questions. With a ``tokenizer`` lengths are counted.

    Raises:
        UserError: anything about the input; nothing is written then.
    """
    _check_new(out)
    if (how.max_prompt or how.max_response) and tokenizer is None:
        raise UserError(
            "a length is given, but no model whose tokens it counts",
            "give --model, the model to be trained",
        )
    rows = load_any_rows(source, offline=offline)
    questions = [q for spec in against for q in _questions(load_any_rows(spec, offline=offline))]
    if tokenizer is not None:
        words = models.load_tokenizer(tokenizer)
        how = replace(how, count=lambda texts: _lengths(words, texts))
    built = build_pairs(rows, how, against=questions, source=source)
    made = {
        "source": source,
        "verdict": how.verdict.text,
        "negative": how.negative,
        "per_problem": how.per_problem,
        "keep": dict(how.keep),
        "drop": dict(how.drop),
        "max_prompt": how.max_prompt,
        "max_response": how.max_response,
        "against": list(against),
        "seed": how.seed,
        "counts": built.counts,
    }
    with staged(out) as folder:
        for name, part in (("pairs", built.pairs), ("first", built.rows)):
            text = _lines(part)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
            made[f"{name}_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        write_json(folder / "made.json", made)
    return made | {"out": str(out)}


def write_ladder(
    source: str,
    out: Path,
    *,
    chosen: models.ModelSource,
    rejected: models.ModelSource,
    max_new_tokens: int = 2048,
    max_rows: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Let two models answer the same prompts greedily; write the answers as pairs into a folder.

    Construction of delta learning (Geng et al. 2025, arXiv:2507.06187): ``chosen`` is the larger of
    two models of a family. Neither answer need be right; train with ``dpo_norm``. Answers without
    an end, empty ones and pairs of the same text are left out, and counted. What a model has
    written is kept in the cache: the same command goes on after a stop.

    Raises:
        UserError: anything about the input, or no pair is left.
    """
    _check_new(out)
    for model in (chosen, rejected):
        models.check_source(model)
    check_different(chosen.path, rejected.path)
    questions = _questions(load_any_rows(source, offline=chosen.offline))[:max_rows]
    sides = {
        side: _answers(model, questions, side, max_new_tokens, progress)
        for side, model in (("chosen", chosen), ("rejected", rejected))
    }
    counts, pairs = {"prompts": len(questions)}, []
    for question, one, other in zip(questions, *sides.values(), strict=True):
        why = _unusable(one, other)
        if why:
            counts[why] = counts.get(why, 0) + 1
        else:
            pairs.append({"question": question, "chosen": one, "rejected": other})
    counts["pairs"] = len(pairs)
    if not pairs:
        raise no_pair_left(source, counts)
    text = _lines(pairs)
    made = {
        "source": source,
        "chosen_model": chosen.path,
        "rejected_model": rejected.path,
        "max_new_tokens": max_new_tokens,
        "counts": counts,
        "pairs_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    with staged(out) as folder:
        (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
        write_json(folder / "made.json", made)
    return made | {"out": str(out)}


def _unusable(one: str | None, other: str | None) -> str:
    """Say why two answers make no pair; empty when they do."""
    if one is None or other is None:
        return ENDLESS
    if not one or not other:
        return EMPTY
    return SAME if one == other else ""


def _answers(
    source: models.ModelSource,
    questions: Sequence[str],
    side: str,
    max_new_tokens: int,
    progress: Progress,
) -> list[str | None]:
    """Let a model answer; None where it came to no end."""
    tokenizer = models.load_tokenizer(source)
    template = Template.for_tokenizer(tokenizer)
    model = models.load_model(source)
    evaluator = Evaluator(
        model, tokenizer, max_new_tokens=max_new_tokens, weights_hash=models.weights_hash(model)
    )
    prompts = [template.prompt_ids(_asked(one, template), tokenizer) for one in questions]
    found = evaluator.write_tokens(
        prompts, progress=lambda done, total: progress(f"{side} answers", done, total)
    )
    stops = stop_ids(model, tokenizer)
    return [
        text_of(tokenizer, tokens) if tokens and tokens[-1] in stops else None for tokens in found
    ]


def _asked(question: str, template: Template) -> Mapping[str, str]:
    """Write a question as a chat, or as a plain prompt where the model knows no chats."""
    if template.chat is None:
        return {"prompt": question, "completion": ""}
    return {"question": question, "answer": ""}


def _questions(rows: Sequence[Row]) -> list[str]:
    """Give the texts that rows ask.

    Raises:
        UserError: names a row that asks nothing.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        text = next((row[name] for name in PROBLEM if isinstance(row.get(name), str)), None)
        if not text:
            names = " or ".join(PROBLEM)
            raise UserError(f"row {number} asks nothing: it has no {names}", "name the columns so")
        found.append(text)
    return found


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [len(row) for row in ids]


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _check_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"'{out}' exists and is left as it is", "give another --out")
