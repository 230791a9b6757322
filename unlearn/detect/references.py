"""Texts surely never seen, read once by the model, and comparable with texts of any length."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from unlearn.detect.engine import TextScorer, labelled
from unlearn.detect.settings import SINGLE_PASS, Settings
from unlearn.detect.tokens import Encoded
from unlearn.errors import UserError
from unlearn.scores import Scores


@dataclass(frozen=True)
class References:
    """What a model says of every token of the references.

    A causal model's log-probability of a token does not depend on what follows it, so the scores of
    the first n tokens of a text come from the readings of the whole text, without another pass.
    """

    scorer: TextScorer
    encoded: list[Encoded]
    groups: list[tuple[list[int], Scores]]
    ends: dict[str, list[int] | None] = field(default_factory=dict, repr=False)
    known: dict[int | None, dict[str, ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    @torch.no_grad()
    def of(cls, scorer: TextScorer, texts: Sequence[str]) -> "References":
        """Let the model read the references.

        Raises:
            UserError: none of them has a token to score.
        """
        encoded = [one for one in scorer.side.tokenizer(texts) if len(one.ids) > 1]
        if not encoded:
            raise UserError("no reference text has a token to score", "give longer texts")
        rows = [labelled(one.ids, n) for n, one in enumerate(encoded)]
        with scorer.side.ready():
            groups = list(scorer.side.groups(rows, scorer.settings.readings))
        return cls(scorer, encoded, groups)

    @property
    def columns(self) -> list[str]:
        """Name the scores that can be taken of a part of a text: those of one pass."""
        return comparable(self.scorer.settings)

    def at(self, tokens: int | None = None) -> dict[str, Float[ndarray, " reference"]]:
        """Give every score of the first ``tokens`` scored tokens; shorter references are left out.

        None takes the references whole. Every length is computed once.
        """
        if tokens not in self.known:
            groups = (self._group(places, scores, tokens) for places, scores in self.groups)
            parts = [part for part in groups if part]
            self.known[tokens] = {
                name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0)
                for name in self.columns
            }
        return self.known[tokens]

    def _group(
        self, places: list[int], scores: Scores, tokens: int | None
    ) -> dict[str, Float[ndarray, " reference"]]:
        long = scores.num_tokens >= (tokens or 1)
        if not bool(long.any()):
            return {}
        kept = [place for place, enough in zip(places, long.tolist(), strict=True) if enough]
        texts = [self._text(self.encoded[place], tokens) for place in kept]
        found = self.scorer.columns(_cut(scores, long, tokens), texts)
        return {name: found[name].double().numpy() for name in self.columns}

    def _text(self, one: Encoded, tokens: int | None) -> str:
        """Give the characters of the first tokens, which only zlib looks at."""
        tokenizer = self.scorer.side.tokenizer
        front = len(tokenizer.front)
        if tokens is None or tokens + 1 >= len(one.ids) or "zlib" not in self.columns:
            return one.text
        if one.text not in self.ends:
            self.ends[one.text] = _ends(tokenizer.tokenizer, one.text)
        ends = self.ends[one.text]
        if ends is None:
            return tokenizer.start_of(one.text, one.ids[front : tokens + 1])
        return one.text[: ends[tokens - front]]


def comparable(settings: Settings) -> list[str]:
    """Name the scores that can be taken of the first tokens of a text: those of one pass."""
    names = [name for name in settings.columns if name != "ppl"]
    return [name for name in names if name.partition("_")[0] in SINGLE_PASS]


def _ends(tokenizer: Any, text: str) -> list[int] | None:
    """Give where each token of a text ends, in characters; None if the tokenizer cannot say."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in found["offset_mapping"]]


def _cut(scores: Scores, rows: torch.Tensor, tokens: int | None) -> Scores:
    """Give the first tokens of some rows; rows are left-aligned."""
    chosen = slice(None, tokens)
    changes = {}
    for one in fields(scores):
        value = getattr(scores, one.name)
        if isinstance(value, torch.Tensor):
            changes[one.name] = value[rows][:, chosen]
    return replace(scores, **changes)
