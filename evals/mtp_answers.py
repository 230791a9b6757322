"""What a model writes, with the drafts of a mask predictor or without: ``unlearn generate``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unlearn import models
from unlearn.errors import UserError
from unlearn.evals.generate import Sampling, stop_ids, text_of, written
from unlearn.evals.mtp import context_at, is_cut, require_room
from unlearn.evals.questions import Questions
from unlearn.models import ModelSource
from unlearn.mtp.decode import Drafting, Sampled, decode, greedy
from unlearn.mtp.predictor import context_of
from unlearn.mtp.storage import CONFIG, Stored, base_of, load_predictor

Emit = Callable[[dict[str, Any]], None]


def answers(
    source: ModelSource,
    questions: Questions,
    *,
    mtp: Path | None = None,
    drafting: Drafting | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    emit: Emit = lambda event: None,
) -> dict[str, Any]:
    """Write the answers of a model, with the drafts of a predictor where there is one.

    ``mtp`` is the predictor's folder; ``source`` may be one itself. At temperature 0 greedy.
    ``ended_by_context`` counts texts that the model's context ended.

    Raises:
        UserError: whatever is wrong with the model, the predictor or the prompts.
    """
    folder = _predictor(source, mtp, drafting)
    if temperature:
        Sampled(temperature)
    models.check_source(source)
    base = base_of(source) if folder and mtp is None else source
    tokenizer, most = models.load_tokenizer(base), context_at(base)
    prompts = questions.ids(base, tokenizer)
    require_room(prompts, most, f"'{base.path}'")
    emit({"event": "stage", "stage": "load"})
    if folder is None:
        return _plain_answers(base, tokenizer, prompts, questions, temperature, seed)
    predictor = load_predictor(folder, base)
    stops = stop_ids(predictor.model, tokenizer)
    rows, tokens, steps, cut = [], 0, 0, 0
    generator = torch.Generator(predictor.device).manual_seed(seed)
    choose = Sampled(temperature, generator) if temperature else greedy
    for place, prompt in enumerate(prompts):
        room = min(questions.max_new_tokens, most - len(prompt))
        found = decode(
            predictor, prompt, max_new_tokens=room, stops=stops, drafting=drafting, choose=choose
        )
        rows.append(_answered(questions, place, tokenizer, found.tokens))
        tokens, steps = tokens + len(found.tokens), steps + found.steps
        cut += room < questions.max_new_tokens and is_cut(found.tokens, room, stops)
        emit({"event": "progress", "what": "writing", "done": place + 1, "total": len(prompts)})
    per_step = tokens / max(1, steps)
    return {"model": base.path, "mtp": str(folder), "rows": rows} | {
        "tokens": tokens, "steps": steps, "tokens_per_step": per_step, "ended_by_context": cut,
    }  # fmt: skip


def _predictor(source: ModelSource, mtp: Path | None, drafting: Drafting | None) -> Path | None:
    """Give the folder of the predictor to write with; None for plain decoding.

    Raises:
        UserError: it holds none, two are given, or ``drafting`` does not fit it.
    """
    own = (Path(source.path) / CONFIG).is_file()
    if own and mtp is not None:
        base = base_of(source).path
        raise UserError(
            f"'{source.path}' is a predictor's folder itself, and --mtp names one too",
            f"leave --mtp out, or give the base instead: {base}",
        )
    folder = mtp or (Path(source.path) if own else None)
    if folder is not None:
        trained = Stored.read(replace(source, path=str(folder))).shape.k
        (drafting or Drafting()).made(trained)
    elif drafting is not None:
        message = "--layout, --k and --masks are about drafts, and no predictor is given"
        raise UserError(message, "name one with --mtp, or leave them out")
    return folder


def _plain_answers(
    source: ModelSource,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    questions: Questions,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    model, most = models.load_model(source), questions.max_new_tokens
    sampling = None
    if temperature:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.rand(len(prompts), most, generator=generator, dtype=torch.float64)
        sampling = Sampling(temperature, numbers.tolist())
    found: list[list[int]] = [[] for _ in prompts]
    batches = written(model, tokenizer, prompts, max_new_tokens=most, sampling=sampling)
    for places, several in batches:
        for place, answer in zip(places, several, strict=True):
            found[place] = answer.tokens
    context, stops = context_of(model), stop_ids(model, tokenizer)
    cut = sum(
        len(prompt) + most > context and is_cut(tokens, context - len(prompt), stops)
        for prompt, tokens in zip(prompts, found, strict=True)
    )
    rows = [_answered(questions, at, tokenizer, tokens) for at, tokens in enumerate(found)]
    tokens = sum(map(len, found))
    return {"model": source.path, "mtp": None, "rows": rows} | {
        "tokens": tokens, "steps": None, "tokens_per_step": None, "ended_by_context": cut,
    }  # fmt: skip


def _answered(
    questions: Questions, place: int, tokenizer: Any, tokens: list[int]
) -> dict[str, Any]:
    row = questions.rows[place]
    prompt = str(row.get("question") or row.get("prompt") or row.get("text") or "")
    return {"prompt": prompt, "text": text_of(tokenizer, tokens), "tokens": len(tokens)}
