"""Which rows an edit goes up on, fits curvature to, and measures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from unlearn.curvature.distance import spaced
from unlearn.curvature.passes import Rows
from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.scores import IGNORE

Listen = Callable[[dict[str, Any]], None]
LossOn = Literal["completion", "all"]
"""Where retain rows have loss: on what a row trains, or on every token."""
SMALLEST_PART = 5
"""Held-out rows are at most one in this many of the retain rows."""


@dataclass(frozen=True)
class Parts:
    """Rows by what they are for."""

    forget: Rows
    fit: Rows
    held_out: Rows
    measured: Rows
    unseen: Rows | None = None
    warning: str = ""

    @classmethod
    def of(
        cls,
        data: Mapping[str, Sequence[Example]],
        held_out: int,
        retain_tokens: int | None,
        forget_rows: int,
        batch_tokens: int,
        loss_on: LossOn = "completion",
    ) -> "Parts":
        """Hold out retain rows at equal distances, and cap the others by labelled tokens."""

        def rows(examples: Sequence[Example]) -> Rows:
            return Rows(examples, batch_tokens=batch_tokens)

        if "retain" not in data:
            raise UserError("the edit needs retain rows: it is measured on them", "give --retain")
        forget, retain = list(data["forget"]), _labelled(data["retain"], loss_on)
        apart = spaced(retain, min(held_out, len(retain) // SMALLEST_PART)) if retain[4:] else []
        taken = set(apart)
        rest = [one for place, one in enumerate(retain) if place not in taken]
        return cls(
            rows(forget),
            rows(_capped(rest, retain_tokens)),
            rows([retain[place] for place in apart] or retain),
            rows([forget[place] for place in spaced(forget, forget_rows)]),
            rows(data["unseen"]) if "unseen" in data else None,
            "" if apart else "too few retain rows to hold any out: KL is that of fitted rows",
        )


def _labelled(examples: Sequence[Example], loss_on: LossOn) -> list[Example]:
    if loss_on == "completion":
        return list(examples)
    return [replace(one, labels=list(one.input_ids)) for one in examples]


def _capped(examples: list[Example], tokens: int | None) -> list[Example]:
    """Give all rows, or as many at equal distances as have about this many labelled tokens."""
    total = num_labels(examples)
    if tokens is None or total <= tokens:
        return examples
    return [examples[place] for place in spaced(examples, max(1, len(examples) * tokens // total))]


def num_labels(examples: Sequence[Example]) -> int:
    """Count the tokens that are predicted and labelled."""
    return sum(label != IGNORE for one in examples for label in one.labels[1:])


def told(rows: Rows, what: str, listen: Listen) -> Rows:
    """Give the same rows, whose passes are told of as progress."""

    def progress(done: int, total: int) -> None:
        listen({"event": "progress", "what": what, "done": done, "total": total})

    return replace(rows, progress=progress)
