"""Pairs of answers to one question: one that is to become likelier, one that is not.

A pair becomes two rows, its ``chosen`` and its ``rejected`` side, with the same prompt. Each side
is tokenised like any other row, so the two need not share a batch. This module must stay importable
without torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from unlearn.data.encode import Example
from unlearn.data.rows import Row
from unlearn.errors import UserError, described, did_you_mean

SIDES = ("chosen", "rejected")
"""The streams that the pairs of a file become; row i of one belongs to row i of the other."""
POST_TRAINING = (*SIDES, "text")
"""Streams of post-training: the sides of pairs, and rows that are simply trained on."""
NAMED = 5
"""Rows named in a message."""
HINT = (
    "a pair has prompt (or question), chosen and rejected, as texts; or chosen and rejected as "
    "lists of messages"
)
Turns = list[dict[str, Any]]


def sides_of(rows: Sequence[Row], source: str) -> dict[str, list[Row]]:
    """Give the rows of both sides, in the order of the pairs.

    Pairs are written as TRL reads them: ``prompt`` (or ``question``) with ``chosen`` and
    ``rejected`` as texts; ``prompt`` and both answers as lists of messages; or whole conversations
    as ``chosen`` and ``rejected``. A ``question`` goes through the chat template, a ``prompt`` does
    not. An answer written as messages may follow a prompt written as text: then that is the user's
    turn.

    Raises:
        UserError: a row is no pair, or its two answers are the same.
    """
    pairs = [_sides(row, f"row {number} of '{source}'") for number, row in enumerate(rows, 1)]
    same = [number for number, (one, other) in enumerate(pairs, 1) if one == other]
    if same:
        raise _identical(same, len(pairs), source)
    return {side: [pair[place] for pair in pairs] for place, side in enumerate(SIDES)}


def check_sides(sides: Mapping[str, Sequence[Example]], source: str, max_length: int) -> None:
    """Refuse pairs of which the same tokens are left.

    Raises:
        UserError: names them.
    """
    both = zip(*(sides[side] for side in SIDES), strict=True)
    same = [number for number, (one, other) in enumerate(both, 1) if one.hashed() == other.hashed()]
    if same:
        longest = max(len(one.input_ids) + one.cut for side in SIDES for one in sides[side])
        hint = (
            f"max_length={max_length} cuts off where they differ; the longest row needs {longest}"
        )
        raise _identical(same, len(sides["chosen"]), source, hint)


def _identical(same: Sequence[int], total: int, source: str, hint: str = "") -> UserError:
    named = ", ".join(map(str, same[:NAMED])) + (", …" if len(same) > NAMED else "")
    have = "pairs have" if len(same) > 1 else "pair has"
    return UserError(
        f"{len(same)} {have} two identical answers, of {total} in '{source}' (row {named})",
        hint or "remove them: they teach nothing",
    )


def _sides(row: Mapping[str, Any], place: str) -> tuple[Row, Row]:
    for side in SIDES:
        if row.get(side) is None:
            spare = [name for name, value in row.items() if value is not None]
            message = f"{place} has no '{side}'{did_you_mean(side, spare)}"
            raise UserError(message, f"{HINT}; or name the column with --map {side}=COLUMN")
    kept = {key: value for key, value in row.items() if key not in (*SIDES, "prompt", "question")}
    chosen, rejected = (_answered(row, side, place) for side in SIDES)
    return {**kept, **chosen}, {**kept, **rejected}


def _answered(row: Mapping[str, Any], side: str, place: str) -> Row:
    answer, prompt = row[side], row.get("prompt")
    if isinstance(answer, str):
        for name, said in (("question", "answer"), ("prompt", "completion")):
            if isinstance(row.get(name), str):
                return {name: row[name], said: answer}
        raise UserError(f"{place} has '{side}' as text, but no prompt or question as text", HINT)
    turns = _turns(answer, side, place)
    before = _before(turns, prompt if prompt is not None else row.get("question"), place)
    return {"messages": [*before, *turns]}


def _before(turns: Turns, prompt: Any, place: str) -> Turns:
    """Give the turns that come before an answer written as messages."""
    if prompt is None or turns[0]["role"] != "assistant":  # a whole conversation
        return []
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return _turns(prompt, "prompt", place)


def _turns(value: Any, name: str, place: str) -> Turns:
    if not isinstance(value, list) or not value or not all(isinstance(t, dict) for t in value):
        raise UserError(f"{place}: '{name}' is {described(value)}, not a text or messages", HINT)
    if not all(isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in value):
        raise UserError(f"{place}: a turn of '{name}' has no role or no content", HINT)
    return value
