"""Training on keywords alone: which labelled tokens of the forget set keep their label.

No language model is asked for keywords, unlike in Pal et al. 2025 (arXiv:2504.10185): they are the
tokens that the forget set has and the retain set has not, or words that the user names.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unlearn.data.encode import IGNORE, Example
from unlearn.errors import UserError
from unlearn.selection import highest, num_kept

Positions = list[list[int]]
"""Places of labels that are kept, one list per example."""


def log_odds(forget: Sequence[Example], retain: Sequence[Example]) -> dict[int, float]:
    """Say how much more each token of the forget answers belongs there than to the retain answers.

    ``log((f + 1) / (F + V)) - log((r + 1) / (R + V))`` in nats: f and r count the token among the
    F and R labelled tokens of each set, V the distinct tokens of both. This measure is our own
    choice, not the paper's.
    """
    here, there = _counts(forget), _counts(retain)
    size = len(here | there)
    ours, theirs = here.total() + size, there.total() + size
    return {
        token: math.log((count + 1) / ours) - math.log((there[token] + 1) / theirs)
        for token, count in here.items()
    }


def keyword_positions(
    forget: Sequence[Example], retain: Sequence[Example], fraction: float
) -> tuple[Positions, dict[int, float]]:
    """Choose the labelled tokens with the highest :func:`log_odds`; give places and all scores.

    ``fraction`` is the share of all labelled tokens that is kept; of equal tokens the first.
    """
    scores = log_odds(forget, retain)
    places = [(row, at) for row, example in enumerate(forget) for at in _labelled(example)]
    values = [scores[forget[row].labels[at]] for row, at in places]
    found: Positions = [[] for _ in forget]
    for kept in highest(values, num_kept(len(places), fraction)):
        row, at = places[kept]
        found[row].append(at)
    return found, scores


def word_positions(forget: Sequence[Example], words: Sequence[str], tokenizer: Any) -> Positions:
    """Find every place in the answers where one of these words stands, as the tokenizer writes it.

    Raises:
        UserError: a word stands in no answer.
    """
    kept: list[set[int]] = [set() for _ in forget]
    missing = []
    for word in words:
        forms = _forms(word, tokenizer)
        hits = [_occurrences(example, form) for example in forget for form in forms]
        for example, found in zip(range(len(forget)), _grouped(hits, len(forms)), strict=True):
            kept[example] |= found
        if not any(hits):
            missing.append(word)
    if missing:
        raise UserError(
            f"in no answer of the forget set: {', '.join(map(repr, missing))}",
            "give words as they stand there, capitals included",
        )
    return [sorted(places) for places in kept]


def masked(example: Example, positions: Sequence[int]) -> Example:
    """Give the same example with labels at these places only."""
    kept = set(positions)
    labels = [label if at in kept else IGNORE for at, label in enumerate(example.labels)]
    return replace(example, labels=labels)


def _labelled(example: Example) -> list[int]:
    """List the places whose label counts; the first token has nothing to be predicted from."""
    return [at for at in range(1, len(example.labels)) if example.labels[at] != IGNORE]


def _counts(examples: Sequence[Example]) -> Counter[int]:
    return Counter(example.labels[at] for example in examples for at in _labelled(example))


def _forms(word: str, tokenizer: Any) -> list[list[int]]:
    """Give the tokens of a word at the start of a text and after a space."""
    texts = (word, f" {word}")
    forms = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [form for form in forms if form]


def _occurrences(example: Example, form: Sequence[int]) -> set[int]:
    size = len(form)
    starts = (at for at in _labelled(example) if example.labels[at : at + size] == list(form))
    return {at + offset for at in starts for offset in range(size)}


def _grouped(hits: Sequence[set[int]], size: int) -> list[set[int]]:
    """Join the hits of all forms of a word in one example."""
    return [set().union(*hits[at : at + size]) for at in range(0, len(hits), size)]
