"""What a model writes by itself: greedy answers to many prompts.

A plain loop over the model's own key-value cache. Nothing but the prompts decides the answers: the
sampling defaults and penalties that many models ship in their generation config are not applied.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from unlearn.data.collate import batches_by_length
from unlearn.data.encode import pad_token_id
from unlearn.errors import UserError
from unlearn.head import plain

Progress = Callable[[int, int], None]


@dataclass
class _Answer:
    """One row while it is being answered; ``room`` is the most tokens it may have."""

    prompt: list[int]
    room: int
    stops: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    finished: bool = False

    def append(self, token: int) -> None:
        if len(self.tokens) < self.room:
            self.tokens.append(token)
        self.finished = token in self.stops or len(self.tokens) >= self.room

    @property
    def context(self) -> list[int]:
        return self.prompt + self.tokens


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    token_budget: int = 32768,
    known: Sequence[Sequence[int]] | None = None,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Give the greedy continuation of each prompt, in input order, without special tokens.

    An answer ends at an end-of-sequence token, after ``max_new_tokens``, or where the model's
    positions end. A batch holds at most ``token_budget`` tokens, prompts and room for the answers
    counted. ``known`` gives, per prompt, tokens already known to be the first that greedy decoding
    would choose (from a teacher-forced pass); they are not computed again.

    Raises:
        UserError: the model cannot decode with a key-value cache, or a prompt is empty.
    """
    _check(model, prompts)
    stops, most = stop_ids(model, tokenizer), _max_positions(model)
    answers = []
    for place, prompt in enumerate(prompts):
        room = max(0, min(max_new_tokens, most - len(prompt)))
        answer = _Answer(list(prompt), room, stops, finished=room == 0)
        for token in known[place] if known else ():
            if not answer.finished:
                answer.append(token)
        answers.append(answer)
    waiting = [answer for answer in answers if not answer.finished]
    pad_id = pad_token_id(tokenizer)
    with evaluation_mode(model):
        lengths = [len(answer.prompt) + answer.room for answer in waiting]
        for group in batches_by_length(lengths, token_budget):
            progress(sum(answer.finished for answer in answers), len(answers))
            _decode(model, [waiting[place] for place in group], pad_id)
    progress(len(answers), len(answers))
    return [_text(tokenizer, answer.tokens) for answer in answers]


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Give the tokens that end an answer: the tokenizer's EOS and those the model names."""
    named = getattr(getattr(plain(model), "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(i) for i in (*named, tokenizer.eos_token_id) if i is not None)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch dropout off and gradients too; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _decode(model: Any, answers: list[_Answer], pad_id: int) -> None:
    """Extend all answers token by token; finished ones leave the batch."""
    device = next(model.parameters()).device
    ids, attention = (part.to(device) for part in _left_pad(answers, pad_id))
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=plain(model).config)
    accepted = _forward_parameters(model)
    while True:
        inputs = {"position_ids": positions, "logits_to_keep": 1}
        inputs = {name: value for name, value in inputs.items() if name in accepted}
        output = model(
            input_ids=ids, attention_mask=attention, past_key_values=cache, use_cache=True, **inputs
        )
        ids = output.logits[:, -1:].argmax(-1)
        for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
            answer.append(token)
        keep = [place for place, answer in enumerate(answers) if not answer.finished]
        if not keep:
            return
        attention = torch.nn.functional.pad(attention, (0, 1), value=1)
        positions = positions[:, -1:] + 1
        if len(keep) < len(answers):
            answers = [answers[place] for place in keep]
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            ids, attention, positions = ids[index], attention[index], positions[index]


def _left_pad(
    answers: Sequence[_Answer], pad_id: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    longest = max(len(answer.context) for answer in answers)
    ids = torch.full((len(answers), longest), pad_id)
    attention = torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        start = longest - len(answer.context)
        ids[row, start:] = torch.tensor(answer.context)
        attention[row, start:] = 1
    return ids, attention


def _text(tokenizer: Any, tokens: list[int]) -> str:
    """Decode as written: tidying spaces would touch the answers but not the true ones."""
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text.strip()


def _check(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    empty = [place for place, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise UserError(
            f"row {empty[0] + 1} has an empty prompt: there is nothing to continue",
            "set evals.generate to false, or give rows with a question",
        )
    if "past_key_values" not in _forward_parameters(model):
        raise UserError(
            f"{type(plain(model)).__name__} cannot write answers here: it has no key-value cache",
            "set evals.generate to false; probability and extraction strength remain",
        )


def _forward_parameters(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(plain(model).forward).parameters)


def _max_positions(model: Any) -> int:
    config = plain(model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 10**9)
