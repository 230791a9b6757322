"""Other answers to the same questions: refusals, and alternates that a model has written.

A stream of other answers belongs to another stream. Wherever a row of that one goes, one of its
other answers goes along; which one is a pure function of (seed, epoch, row). This module must stay
importable without torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from unlearn.data.annotations import COLUMN as IMPORTANT
from unlearn.data.draws import uniform
from unlearn.data.encode import Example
from unlearn.data.files import read_file
from unlearn.data.rows import Row, row_kind
from unlearn.errors import UserError

BELONGS = {"refusal": "forget", "alternate": "forget", "retain_refusal": "retain"}
"""Streams of other answers -> the stream whose questions they answer."""
IN_TURN = ("alternate",)
"""Streams whose answers are taken in turn, one per epoch, from one drawn at random."""
SHIPPED = "the refusals that ship"


@dataclass(frozen=True)
class Draws:
    """Which of its answers a row gets in an epoch, and where that one stands in its stream.

    ``counts[row]`` answers belong to a row. ``places`` has the (row, answer) pairs that are drawn
    in the first ``epochs`` epochs; later epochs draw as these did, from the first one on.
    """

    stream: str
    seed: int
    counts: Sequence[int]
    epochs: int
    places: Mapping[tuple[int, int], int]

    @property
    def belongs(self) -> str:
        """The stream whose questions are answered."""
        return BELONGS[self.stream]

    def place(self, epoch: int, row: int) -> int:
        """Give the place of the answer that this row gets in this epoch."""
        return self.places[row, self.answer(epoch, row)]

    def answer(self, epoch: int, row: int) -> int:
        """Give the number of the answer that this row gets in this epoch."""
        epoch, count = epoch % self.epochs, self.counts[row]
        if self.stream in IN_TURN:
            return (uniform(self.seed, 0, row, count, self.stream) + epoch) % count
        return uniform(self.seed, epoch, row, count, self.stream)


@dataclass(frozen=True)
class OtherAnswers:
    """A stream of other answers: the (row, answer) pairs that are drawn, as tokens."""

    draws: Draws
    examples: Sequence[Example]


def read_refusals(path: str | Path | None = None) -> list[str]:
    """Read refusals, one per line of a ``.txt`` or ``.jsonl`` file; without a path, those shipped.

    Raises:
        UserError: no such file, no refusal in it, or something that is no text.
    """
    if path is None:
        text = (resources.files("unlearn.data") / "refusals.txt").read_text(encoding="utf-8")
        return text.splitlines()
    form = "one refusal per line of a .txt file, or JSON strings in a .jsonl file"
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no file of refusals '{path}'", form)
    found = [row.get("text") for row in read_file(file)]
    for number, refusal in enumerate(found, start=1):
        if not isinstance(refusal, str) or not refusal.strip():
            raise UserError(f"refusal {number} of '{path}' is no text", form)
    if not found:
        raise UserError(f"'{path}' holds no refusals", form)
    return [str(refusal).strip() for refusal in found]


def alternates_of(rows: Sequence[Row], source: str) -> list[list[str]]:
    """Give the alternates of every row: its column ``alternate``, a text or a list of texts.

    Raises:
        UserError: names the first row that has none.
    """
    return [_alternates(row, f"row {n} of '{source}'") for n, row in enumerate(rows, start=1)]


def _alternates(row: Mapping[str, Any], place: str) -> list[str]:
    given = row.get("alternate")
    found = [given] if isinstance(given, str) else given
    if not found:
        raise UserError(
            f"{place} has no 'alternate'",
            "`unlearn data alternates` writes that column; or name the one that holds it with "
            "--map alternate=COLUMN",
        )
    if not isinstance(found, list) or not all(isinstance(t, str) and t.strip() for t in found):
        raise UserError(
            f"{place}: 'alternate' holds something else than texts",
            "give a text, or a list of them",
        )
    return found


def check_answerable(rows: Sequence[Row], stream: str, source: str) -> None:
    """Refuse rows to which no other answer can be given: plain texts, chats of several answers.

    Raises:
        UserError: names the first of them.
    """
    hint = f"a term reads '{stream}', the rows' questions with another answer: "
    for number, row in enumerate(rows, start=1):
        kind = row_kind(row)
        if kind == "text":
            message = f"row {number} of '{source}' is a plain text and asks nothing"
            raise UserError(message, hint + "give rows of question and answer")
        if kind == "messages" and sum(turn["role"] == "assistant" for turn in row["messages"]) > 1:
            message = f"row {number} of '{source}' has several assistant turns"
            raise UserError(message, hint + "give chats with one answer each")


def asked(row: Mapping[str, Any]) -> tuple[str, str]:
    """Give the question and the answer of a row as texts."""
    kind = row_kind(row)
    if kind == "messages":
        said = {turn["role"]: turn["content"] for turn in row["messages"]}
        return said.get("user", ""), said["assistant"]
    return (row["question"], row["answer"]) if kind == "qa" else (row["prompt"], row["completion"])


def answered(row: Mapping[str, Any], answer: str) -> Row:
    """Give the row with another answer, without what it said about its own."""
    kind = row_kind(row)
    row = {key: value for key, value in row.items() if key != IMPORTANT}
    if kind == "messages":
        turns = [
            {**turn, "content": answer} if turn["role"] == "assistant" else turn
            for turn in row["messages"]
        ]
        return {**row, "messages": turns}
    return {**row, "answer" if kind == "qa" else "completion": answer}
