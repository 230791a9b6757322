"""Samples from a model in this process: batched, and each with its own random numbers."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from unlearn.errors import RunFailed, UserError
from unlearn.evals.answers import Evaluator
from unlearn.evals.generate import Sampling, stop_ids, written
from unlearn.evals.memory import require_memory, writing_bytes
from unlearn.evals.reasoning.completions import Completion, Place
from unlearn.evals.reasoning.options import MathOptions
from unlearn.evals.reasoning.problems import Prompt

BLOCK = 256


class Numbers(Sequence[float]):
    """Random numbers in [0, 1) that seed, problem and sample alone decide; drawn when asked for."""

    def __init__(self, seed: int, place: Place, size: int) -> None:
        self._random = np.random.Generator(np.random.PCG64(stream_of(seed, place)))
        self._drawn: list[float] = []
        self._size = size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(index)
        while len(self._drawn) <= index:
            self._drawn += self._random.random(BLOCK).tolist()
        return self._drawn[index]


def stream_of(seed: int, place: Place) -> int:
    """Give the 128-bit seed of one sample: a hash of seed, problem and sample number."""
    digest = hashlib.sha256(f"{seed}/{place[0]}/{place[1]}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


def sample(
    model: Any,
    tokenizer: Any,
    prompts: dict[str, Prompt],
    places: Sequence[Place],
    options: MathOptions,
) -> Iterator[list[Completion]]:
    """Write the samples asked for, a batch at a time; verdicts are still to be given.

    ``prompts`` are by problem. A sample depends on the model, its prompt, the settings and the seed
    alone: not on the batch, the order, or what was written before (up to rounding of the logits in
    batches of another shape).

    Raises:
        UserError: the model gives no finite numbers, or a batch would not fit on the GPU.
        RunFailed: it stopped giving finite numbers.
    """
    Evaluator(model, tokenizer).check_finite()
    rows = [list(prompts[problem].ids) for problem, _ in places]
    longest = max(map(len, rows)) + options.max_new_tokens
    budget = longest * min(options.batch_size, len(rows))
    try:
        require_memory(model, writing_bytes(model, budget), batch_tokens=budget)
    except UserError as error:
        hint = "lower --batch-size (batch_size in a recipe) or --max-new-tokens, or free the GPU"
        raise UserError(error.message, hint) from error
    numbers = [Numbers(options.seed, place, options.max_new_tokens) for place in places]
    sampling = Sampling(options.temperature, numbers, top_p=options.top_p)
    stops = stop_ids(model, tokenizer)
    for group, answers in written(
        model,
        tokenizer,
        rows,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling if options.temperature else None,
        token_budget=budget,
    ):
        found = []
        for at, answer in zip(group, answers, strict=True):
            problem, number = places[at]
            if not answer.sound:
                raise RunFailed(
                    "the model gave NaN while it wrote", "load it in float32: --dtype float32"
                )
            ended = bool(answer.tokens) and answer.tokens[-1] in stops
            text = prompts[problem].prefix + _text(tokenizer, answer.tokens)
            found.append(Completion(problem, number, text, len(answer.tokens), not ended))
        yield found


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text.rstrip()
