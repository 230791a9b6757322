"""What a model writes by itself: greedy or sampled answers to many prompts.

A plain loop over the model's own key-value cache. Nothing but the prompts decides the answers: the
sampling defaults and penalties that many models ship in their generation config are not applied.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from unlearn.data.encode import pad_token_id
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.ranks import Ranks, whole
from unlearn.scoring import evaluation_mode as evaluation_mode

Progress = Callable[[int, int], None]


LEAVING = 0.1
"""Share of a batch that must be finished before its rows leave: each leaving copies the cache."""


@dataclass
class Answer:
    """One row while it is being answered; ``room`` is the most tokens it may have.

    ``place`` is that of its prompt. ``sound``: every token was chosen from numbers, none from NaN.
    """

    prompt: list[int]
    room: int
    stops: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    sound: bool = True
    place: int = 0

    def append(self, token: int) -> None:
        """Take one more token, unless the answer has ended."""
        if not self.finished:
            self.tokens.append(token)
            self.finished = token in self.stops or len(self.tokens) >= self.room

    @property
    def context(self) -> list[int]:
        """Give the prompt and what is written so far."""
        return self.prompt + self.tokens


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: ``numbers[place][t]``, in [0, 1), decides token t of an answer.

    So an answer depends on its own numbers only, not on the rows it shares a batch with (up to
    rounding of the model's logits). ``ended`` may end an answer early. ``top_p`` below 1 leaves the
    fewest tokens that hold that much probability after the temperature (Holtzman et al. 2020,
    arXiv:1904.09751).
    """

    temperature: float
    numbers: Sequence[Sequence[float]]
    ended: Callable[[Answer], bool] = lambda answer: False
    top_p: float = 1.0

    def draw(
        self, logits: Float[Tensor, "batch vocab"], answers: Sequence[Answer]
    ) -> Int[Tensor, "batch 1"]:
        """Give the token at which the cumulative probability passes each answer's number."""
        wide = logits.float() if logits.device.type == "mps" else logits.double()
        cumulative = self.probabilities(wide).cumsum(-1)
        at = [0.0 if a.finished else self.numbers[a.place][len(a.tokens)] for a in answers]
        wanted = torch.tensor(at, device=wide.device, dtype=wide.dtype)[:, None]
        found = torch.searchsorted(cumulative, wanted * cumulative[:, -1:], right=True)
        return found.clamp_max(logits.shape[-1] - 1)

    def probabilities(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """Give what tokens are drawn with, up to a factor; 0 outside the nucleus."""
        found = (logits / self.temperature).softmax(-1)
        if self.top_p >= 1:
            return found
        falling, order = found.sort(dim=-1, descending=True, stable=True)
        before = falling.cumsum(-1) - falling
        outside = torch.zeros_like(found, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
        return found.masked_fill(outside, 0.0)


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

    See :func:`written` for the arguments and :func:`text_of` for the text.
    """
    found: list[Answer | None] = [None] * len(prompts)
    done = 0
    for places, answers in written(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        token_budget=token_budget,
        known=known,
    ):
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
        done += len(places)
        progress(done, len(prompts))
    return [text_of(tokenizer, answer.tokens) for answer in found if answer is not None]


def written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    token_budget: int = 32768,
    known: Sequence[Sequence[int]] | None = None,
    sampling: Sampling | None = None,
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Write the continuation of every prompt; give groups of them with their places.

    The greedy one, unless ``sampling`` says how tokens are drawn.

    An answer ends at an end-of-sequence token, after ``max_new_tokens``, or where the model's
    positions end. A batch holds at most ``token_budget`` tokens, prompts and room for the answers
    counted. ``known`` gives, per prompt, tokens already known to be the first that greedy decoding
    would choose (from a teacher-forced pass); they are not computed again.

    With ``torch.distributed`` initialised, every rank must call this with the same prompts. Whole
    groups are dealt out to the ranks, and every rank is given all of them.

    Raises:
        UserError: the model cannot decode with a key-value cache, or a prompt is empty.
    """
    check_prompts(model, prompts)
    model = whole(model)
    answers = _begun(model, tokenizer, prompts, max_new_tokens, known)
    finished = [place for place, answer in enumerate(answers) if answer.finished]
    if finished:
        yield finished, [answers[place] for place in finished]
    groups = _groups(answers, token_budget)
    pad_id = pad_token_id(tokenizer)
    ranks = Ranks.of(model)
    for start in range(0, len(groups), ranks.size):
        turn = groups[start : start + ranks.size]
        for rank, places in enumerate(turn):
            if rank == ranks.rank:
                with evaluation_mode(model):
                    _decode(model, [answers[place] for place in places], pad_id, sampling)
        if ranks.size > 1:
            _exchange(ranks, [[answers[place] for place in places] for places in turn])
        for places in turn:
            yield places, [answers[place] for place in places]


def _begun(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    known: Sequence[Sequence[int]] | None,
) -> list[Answer]:
    stops, most = stop_ids(model, tokenizer), max_positions(model)
    answers = []
    for place, prompt in enumerate(prompts):
        room = max(0, min(max_new_tokens, most - len(prompt)))
        answer = Answer(list(prompt), room, stops, finished=room == 0, place=place)
        for token in known[place] if known else ():
            answer.append(token)
        answers.append(answer)
    return answers


def _groups(answers: Sequence[Answer], token_budget: int) -> list[list[int]]:
    """Group unfinished answers by the length of their context, longest first."""
    waiting = [place for place, answer in enumerate(answers) if not answer.finished]
    groups: list[list[int]] = []
    longest = 0
    for place in sorted(waiting, key=lambda place: (-len(answers[place].context), place)):
        need = len(answers[place].prompt) + answers[place].room
        longest = max(longest, need)
        if groups and longest * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(place)
        else:
            groups.append([place])
            longest = need
    return groups


def _exchange(ranks: Ranks, groups: Sequence[Sequence[Answer]]) -> None:
    """Give every rank the tokens that group 0 got on rank 0, group 1 on rank 1, and so on."""
    room = max(answer.room for group in groups for answer in group)
    sizes = [len(group) for group in groups] + [0] * (ranks.size - len(groups))
    mine = groups[ranks.rank] if ranks.rank < len(groups) else []
    table = torch.zeros(room + 2, len(mine), dtype=torch.long, device=ranks.device)
    for column, answer in enumerate(mine):
        numbers = [len(answer.tokens), int(answer.sound), *answer.tokens]
        table[: len(numbers), column] = torch.tensor(numbers)
    for group, found in zip(groups, ranks.gather(table, sizes), strict=False):
        for answer, (length, sound, *tokens) in zip(group, found.t().tolist(), strict=True):
            answer.tokens, answer.sound, answer.finished = tokens[:length], bool(sound), True


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Give the tokens that end an answer: the tokenizer's EOS and those the model names."""
    named = getattr(getattr(plain(model), "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(i) for i in (*named, tokenizer.eos_token_id) if i is not None)


def _decode(model: Any, answers: list[Answer], pad_id: int, sampling: Sampling | None) -> None:
    """Extend all answers token by token; finished ones leave the batch, a tenth at a time.

    No row is carried past the model's last position.
    """
    most, longest = max_positions(model), max(len(answer.context) for answer in answers)
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
        ids = _choose(output.logits[:, -1], answers, sampling)
        keep = [place for place, answer in enumerate(answers) if not answer.finished]
        if not keep:
            return
        attention = torch.nn.functional.pad(attention, (0, 1), value=1)
        positions = positions[:, -1:] + 1
        longest += 1
        leaving = len(answers) - len(keep)
        if leaving and (leaving >= LEAVING * len(answers) or longest >= most):
            answers = [answers[place] for place in keep]
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            ids, attention, positions = ids[index], attention[index], positions[index]


def _choose(
    logits: Tensor, answers: Sequence[Answer], sampling: Sampling | None
) -> Int[Tensor, "batch 1"]:
    """Append the next token to every answer that is not finished, and give all of them."""
    ids = sampling.draw(logits, answers) if sampling else logits.argmax(-1, keepdim=True)
    sound = logits.gather(-1, ids).isfinite()  # argmax takes NaN for the largest number
    chosen = torch.cat([ids, sound.long()], dim=-1).tolist()
    for answer, (token, is_sound) in zip(answers, chosen, strict=True):
        answer.sound &= bool(is_sound) or answer.finished
        answer.append(token)
        if sampling and not answer.finished:
            answer.finished = sampling.ended(answer)
    return ids


def _left_pad(
    answers: Sequence[Answer], pad_id: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    longest = max(len(answer.context) for answer in answers)
    ids = torch.full((len(answers), longest), pad_id)
    attention = torch.zeros_like(ids)
    for row, answer in enumerate(answers):
        start = longest - len(answer.context)
        ids[row, start:] = torch.tensor(answer.context)
        attention[row, start:] = 1
    return ids, attention


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Give the text of an answer without special tokens and outer white space.

    Decoded as written: tidying spaces would touch the answers but not the true ones.
    """
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text.strip()


def check_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> None:
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


def max_positions(model: Any) -> int:
    """Give the most tokens, prompt included, that a model knows places for."""
    config = plain(model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 10**9)
