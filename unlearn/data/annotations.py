"""Which tokens of an answer its row names as important: the column ``important``.

It holds passages of the answer, word by word: a list of texts, or one text. Each is marked wherever
it stands in the answer; a token counts when any of its characters belongs to a passage.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from unlearn.data.templates import Rendered
from unlearn.errors import UserError

COLUMN = "important"
Span = tuple[int, int]


def has_annotations(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether any row names passages."""
    return any(row.get(COLUMN) for row in rows)


def passages(row: Mapping[str, Any]) -> list[str]:
    """Give the passages that a row names; none when it has no such column.

    Raises:
        UserError: they are neither a text nor a list of texts.
    """
    found = row.get(COLUMN) or []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise UserError(
            f"'{COLUMN}' is {found!r}, not a list of texts", "give passages of the answer"
        )
    return found


def character_spans(row: Mapping[str, Any], rendered: Rendered) -> dict[str, list[Span]]:
    """Find each passage in the rendered text, from where the first answer begins."""
    start = len(rendered.prompts[0])
    return {one: _found(rendered.text, one, start) for one in passages(row)}


def _found(text: str, passage: str, start: int) -> list[Span]:
    spans = []
    while (place := text.find(passage, start)) >= 0:
        start = place + len(passage)
        spans.append((place, start))
    return spans


def mark_tokens(
    spans: Mapping[str, Sequence[Span]],
    offsets: Sequence[Span],
    labelled: Sequence[bool],
    *,
    cut: bool,
) -> list[bool]:
    """Mark the labelled tokens that touch a passage. ``offsets``: each token's characters.

    Raises:
        UserError: a passage touches no labelled token, and nothing was cut away.
    """
    marks = [False] * len(labelled)
    for passage, places in spans.items():
        touched = [
            token
            for token, (begin, end) in enumerate(offsets[: len(labelled)])
            if labelled[token] and any(begin < stop and start < end for start, stop in places)
        ]
        if not touched and not cut:
            message = f"the important passage '{passage}' does not stand in the answer"
            raise UserError(message, "write it as it stands there, letter by letter")
        for token in touched:
            marks[token] = True
    return marks


def token_offsets(tokenizer: Any, rendered: Rendered, front: int) -> list[Span]:
    """Give the characters of each token; those that a tokenizer puts in ``front`` have none."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"'{COLUMN}' needs a fast tokenizer, which knows where its tokens stand",
            "leave the column out, or convert the tokenizer",
        )
    found = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    return [(0, 0)] * front + [tuple(span) for span in found["offset_mapping"]]
