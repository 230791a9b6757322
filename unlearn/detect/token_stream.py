"""A long text as a stream of tokens, whatever its length: pieces of text in, tokens out.

A tokenizer given a part of a text may write other tokens at its ends. So every part is tokenised
with some text on either side, and only tokens that do not touch a cut are kept.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from unlearn.detect.text import whole
from unlearn.errors import UserError

PART = 2**16
"""Characters that are tokenised at once."""
OVERLAP = 256
"""Characters on either side of a part that are tokenised with it."""


@dataclass(frozen=True)
class Tokens:
    """Neighbouring tokens of a text.

    ``starts`` and ``ends`` are their characters in the whole text; ``text`` is what lies between
    ``offset`` and the end of the last one.
    """

    ids: Int[ndarray, " token"]
    starts: Int[ndarray, " token"]
    ends: Int[ndarray, " token"]
    text: str
    offset: int


def token_stream(pieces: Iterable[str], tokenizer: Any) -> Iterator[Tokens]:
    """Tokenise a text that comes in pieces; tokens are those of the whole text.

    Raises:
        UserError: the tokenizer cannot say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "windows need a fast tokenizer, which knows where its tokens stand",
            "score the texts whole: --mode rows or --mode paragraphs",
        )
    text, base, position = "", 0, 0
    for piece in pieces:
        text += whole(piece)
        while len(text) - (position - base) > PART + OVERLAP:
            part = position - base + PART + OVERLAP
            found = _tokens(tokenizer, text[:part], base, position, last=False)
            yield found
            position = int(found.ends[-1])
            drop = max(0, position - base - OVERLAP)
            text, base = text[drop:], base + drop
    found = _tokens(tokenizer, text, base, position, last=True)
    if len(found.ids):
        yield found


def _tokens(tokenizer: Any, text: str, base: int, position: int, *, last: bool) -> Tokens:
    """Give the tokens of ``text`` (which begins at ``base``) from ``position`` on."""
    begun = position - base
    ids, starts, ends = _encode(tokenizer, text)
    first = int(np.searchsorted(ends, begun, side="right"))
    if first and ends[first - 1] != begun:  # the tokens before do not end where ours did
        ids, starts, ends = _encode(tokenizer, text[begun:])
        starts, ends, first = starts + begun, ends + begun, 0
    stop = len(ids) if last else int(np.searchsorted(ends, len(text) - OVERLAP, side="right"))
    stop = max(stop, min(first + 1, len(ids)))
    chosen = slice(first, stop)
    until = int(ends[stop - 1]) if stop > first else begun
    return Tokens(
        ids[chosen], starts[chosen] + base, ends[chosen] + base, text[begun:until], position
    )


def _encode(tokenizer: Any, text: str) -> tuple[ndarray, ndarray, ndarray]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(found["input_ids"], dtype=np.int64), spans[:, 0], spans[:, 1]
