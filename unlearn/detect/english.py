"""A rough frequency table of generic English, for when no corpus is at hand, and when it fits.

Nobody counted anything for it: :data:`WORDS` lists common words, the more frequent ones first, as
we put them down; the r-th gets a share in proportion to 1 / (r + 2.7), which is Mandelbrot's form
of Zipf's law (Mandelbrot 1953). Punctuation and word forms at the start of sentences get fixed
shares. A table counted on a corpus like the texts in question is better in every case.
"""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from unlearn.data import tokenize
from unlearn.detect.frequency import FEW_TOKENS, MOST_EXCESS, About, FrequencyTable
from unlearn.detect.text import cleaned
from unlearn.models import tokenizer_sha256

NAME = "generic English"
WORDS_SHARE = 0.8
OFFSET = 2.7
START_OF_SENTENCE, START_OF_TEXT = 0.08, 0.02
MARKS = {",": 0.05, ".": 0.045, "-": 0.006, "'s": 0.006, ' "': 0.006, '"': 0.006, "?": 0.004,
         ":": 0.003, "!": 0.003, " (": 0.003, ")": 0.003, ";": 0.002}  # fmt: skip
TOKENS_PER_ENTRY = 10
"""Counts handed out per entry of the vocabulary: unseen tokens keep a tenth of the mass."""
MOST_UNKNOWN = 0.4
LEAST_ENGLISH = 0.25
"""Share of the commonest words below which texts are not taken for English prose, which has 30 to
45 %."""
COMMONEST = 43
"""Words of the list that are counted as common by :func:`english_share`."""


def words() -> list[str]:
    """List common English words, the more frequent ones first."""
    text = files("unlearn.detect").joinpath("english.txt").read_text(encoding="utf-8")
    return [word for line in text.splitlines() if line[:1] != "#" for word in line.split()]


def generic_english(tokenizer: Any, vocabulary: int = 0) -> FrequencyTable:
    """Make the table for a tokenizer; takes a few milliseconds."""
    size = max(vocabulary, len(tokenizer))
    pieces, weights = zip(*_pieces(), strict=True)
    counts = np.zeros(size)
    for ids, weight in zip(_inside_text(pieces, tokenizer), weights, strict=True):
        np.add.at(counts, ids, weight)
    counts = np.rint(counts / sum(weights) * TOKENS_PER_ENTRY * size).astype(np.int64)
    about = About(
        NAME,
        None,
        str(tokenizer.name_or_path),
        tokenizer_sha256(tokenizer),
        size,
        int(counts.sum()),
        0,
        None,
        "English",
        "none in particular",
        generic=True,
    )
    return FrequencyTable(counts, about)


def _pieces() -> Iterator[tuple[str, float]]:
    """Give every piece as it stands in a text, a space in front where there is one; its share."""
    ranked = words()
    total = sum(1 / (rank + OFFSET) for rank in range(1, len(ranked) + 1))
    for rank, word in enumerate(ranked, start=1):
        share = WORDS_SHARE / (rank + OFFSET) / total
        yield f" {word}", share * (1 - START_OF_SENTENCE - START_OF_TEXT)
        yield f" {word[0].upper()}{word[1:]}", share * START_OF_SENTENCE
        yield f"{word[0].upper()}{word[1:]}", share * START_OF_TEXT
    yield from MARKS.items()


def _inside_text(pieces: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Tokenise pieces as they are inside a text: those that begin with a letter, as its start."""
    (front,) = tokenize(tokenizer, ["a"], adds_special=False)
    starts = [piece[0].isalpha() for piece in pieces]
    given = [piece if start else f"a{piece}" for piece, start in zip(pieces, starts, strict=True)]
    found = tokenize(tokenizer, given, adds_special=False)
    for ids, start in zip(found, starts, strict=True):
        follows = not start and list(ids[: len(front)]) == front
        yield list(ids[len(front) :] if follows else ids)


def english_share(texts: Sequence[str]) -> float:
    """Give the share of words that are among English's commonest, in [0, 1]; 0 without words."""
    found = [word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())]
    common = {word.lower() for word in words()[:COMMONEST]}
    return sum(word in common for word in found) / len(found) if found else 0.0


def table_warnings(table: FrequencyTable, texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Say what is doubtful about judging these texts (or some of them) by a table.

    Compared are the surprise of the texts (mean of -log f per token) with that of the table's own
    corpus: another language or domain has other frequent tokens.
    """
    rows = tokenize(tokenizer, [cleaned(text) for text in texts], adds_special=False)
    ids = np.concatenate([np.asarray(row, np.int64) for row in rows] or [np.empty(0, np.int64)])
    ids = ids[ids < table.about.vocabulary]
    build = "build a table on a corpus like these texts: `unlearn detect freq build`"
    unknown, excess = table.unknown_share(ids), table.surprise(ids) - table.own_surprise()
    found = []
    if table.about.generic:
        found.append(f"dcpdd uses word ranks of {NAME}, not counts of a corpus; {build}")
        share = english_share(texts)
        if not texts:
            return found
        if share < LEAST_ENGLISH:
            found.append(
                f"the texts do not look like English prose ({100 * share:.0f} % common English "
                f"words; prose has 30 to 45): the generic English table does not fit; {build}"
            )
        elif unknown > MOST_UNKNOWN:
            found.append(
                f"{100 * unknown:.0f} % of the tokens are not in the generic English table: the "
                f"texts are of a special domain; {build}"
            )
        return found
    if table.about.tokens < FEW_TOKENS:
        found.append(
            f"the frequency table was counted on {table.about.tokens:,} tokens only; "
            f"{FEW_TOKENS:,} or more are advised"
        )
    if excess > MOST_EXCESS:
        found.append(
            f"the texts are of another language or domain than the table's corpus "
            f"('{table.about.corpus}'): their tokens are rarer there by {excess:.1f} nats on "
            f"average; {build}"
        )
    return found
