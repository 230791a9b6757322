"""What is scored, and what is found about it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    """One text to be scored; ``neighbours`` are other wordings of it."""

    id: str | int
    text: str
    neighbours: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoredText:
    """What is found about one text.

    ``status``: ``ok``; ``short`` (fewer tokens than ``min_tokens``: scores are there, but noisy);
    ``too_short`` (no token to score) and ``nan`` (the model gave no numbers): all scores are None.
    ``notes`` name what a reader must know: ``truncated``, ``cleaned``, ``no_capitals``.
    ``coverage`` is the share of tokens that the frequency table knows, where one is used. ``text``
    is what was scored: after any cut.
    """

    id: str | int
    num_tokens: int
    status: str
    scores: dict[str, float | None]
    notes: tuple[str, ...] = ()
    coverage: float | None = None
    text: str = field(default="", repr=False)

    def as_json(self) -> dict[str, Any]:
        """Give the row that is printed and stored."""
        row = {
            "id": self.id,
            "n_tokens": self.num_tokens,
            "status": self.status,
            "scores": self.scores,
            "notes": list(self.notes),
        }
        return row if self.coverage is None else row | {"frequency_coverage": self.coverage}


def cleaned(text: str) -> str:
    """Take out zero characters (BookMIA has some) and put ``?`` for halves of surrogate pairs."""
    return whole(text.replace("\x00", ""))


def whole(text: str) -> str:
    """Put ``?`` for halves of surrogate pairs, which no tokenizer takes; the length stays."""
    return text.encode("utf-8", "replace").decode()
