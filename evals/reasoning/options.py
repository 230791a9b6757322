"""How problems are put, sampled, judged and summed up."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unlearn.errors import UserError, unknown

VERIFIERS = ("math", "exact")
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""Published with DeepSeek-R1 (arXiv:2501.12948) and Qwen2.5-Math (arXiv:2409.12122)."""


def check_writer(*, model: bool, endpoint: bool, offline: bool) -> None:
    """Refuse to measure nobody, or a server that may not be asked.

    Raises:
        UserError: as said.
    """
    if not model and not endpoint:
        raise UserError("no model was given", "give --model, or --endpoint for a server")
    if endpoint and offline:
        raise UserError("--offline and --endpoint were given", "an endpoint is a connection")


@dataclass(frozen=True)
class MathOptions:
    """Settings of the benchmark; the defaults are REDI's evaluation, but for the length.

    Xu et al. 2025 (arXiv:2505.24850) sample at temperature 0.6 and top-p 0.95, 4 or 16 times, up
    to 32,768 tokens. ``k``: the k of pass@k, by default 1 and ``n``. ``batch_size`` counts
    completions of the longest kind written at once (of shorter prompts a few more); it changes no
    sample.
    """

    n: int = 4
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 2048
    force_prefix: str = ""
    instruction: str = INSTRUCTION
    template: str | None = None
    system_prompt: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    verify: str = "math"
    k: tuple[int, ...] | None = None
    batch_size: int = 16
    seed: int = 0

    @property
    def ks(self) -> tuple[int, ...]:
        """Give every k that is reported, 1 first."""
        return tuple(sorted({1, *(self.k if self.k is not None else (self.n,))}))

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            UserError: says which setting, and what it may be.
        """
        if self.verify not in VERIFIERS:
            raise unknown("--verify", self.verify, VERIFIERS)
        least = {"n": self.n, "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        for name, value in least.items():
            if value < 1:
                raise UserError(f"{_option(name)} is {value}", "give 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature is {self.temperature}", "give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}", "give more than 0 and at most 1")
        if self.temperature == 0 and self.n > 1:
            raise UserError(
                f"--n {self.n} at temperature 0: greedy decoding writes the same text every time",
                "give --n 1, or a temperature above 0",
            )
        for k in self.ks:
            if not 1 <= k <= self.n:
                raise UserError(f"pass@{k} of {self.n} samples", f"give --k from 1 to {self.n}")

    def check_untokenized(self) -> None:
        """Refuse what only a tokenizer can do, where an endpoint alone makes the prompts.

        Raises:
            UserError: there is a template.
        """
        if self.template or self.template_args:
            raise UserError(
                "a template needs the model's tokenizer", "give --model beside --endpoint"
            )

    def decisive(self) -> dict[str, Any]:
        """Give every setting that can change a stored completion or its verdict."""
        left_out = ("k", "batch_size")
        found = {name: value for name, value in vars(self).items() if name not in left_out}
        return found | {"template_args": dict(self.template_args)}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
