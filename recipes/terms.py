"""Terms of the loss: a weighted objective on a stream of rows.

This module must stay importable without torch.
"""

from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from unlearn.data.answers import BELONGS
from unlearn.data.pairs import POST_TRAINING, SIDES
from unlearn.recipes.posttraining import ReweightSection
from unlearn.recipes.section import Section

Stream = Literal[
    "forget", "retain", "refusal", "retain_refusal", "alternate", "chosen", "rejected", "text"
]
"""Rows that a term can be on. To unlearn: the forget and the retain set, and other answers to their
questions. To post-train: the two sides of pairs, and plain rows."""


class Term(Section):
    """A weighted objective on a stream of rows. Other keys are the objective's hyperparameters."""

    model_config = ConfigDict(extra="allow")

    objective: str = Field(min_length=1)
    """What is minimised, for instance npo or nll."""
    on: Stream
    """The rows it sees; for an objective on pairs, the answers that are to become likelier."""
    rejected: Stream | None = None
    """For an objective on pairs: the answers that are to become less likely."""
    weight: float = Field(default=1.0, ge=0)
    """Factor in the total loss; gamma (forget) and alpha (retain) in the literature."""
    reweight: ReweightSection | None = None
    """Let rows count by their losses; null lets them all count alike."""

    @property
    def hyper(self) -> dict[str, Any]:
        """The objective's hyperparameters, as written."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams it reads."""
        return (self.on,) if self.rejected is None else (self.on, self.rejected)

    @field_validator("rejected")
    @classmethod
    def _answers_to_one_question(cls, value: Stream | None, info: ValidationInfo) -> Stream | None:
        on = info.data.get("on")
        if value is None or on is None:
            return value
        if value == on:
            raise ValueError(f"'{value}' given, which is `on` too; a pair has two answers")
        if rows_of(value) != rows_of(on):
            raise ValueError(
                f"'{value}' given, but `on: {on}` answers the {rows_of(on)} rows; "
                "a pair answers one question"
            )
        return value

    @model_serializer(mode="wrap")
    def _without_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        absent = {key for key in ("rejected", "reweight") if written.get(key) is None}
        return {key: value for key, value in written.items() if key not in absent}


def rows_of(stream: str) -> str:
    """Name the rows that a stream is about: ``forget``, ``retain``, ``pairs`` or ``text``."""
    return "pairs" if stream in SIDES else BELONGS.get(stream, stream)


def read_by(terms: tuple[Term, ...]) -> set[str]:
    """Name the streams that terms read."""
    return {stream for term in terms for stream in term.streams}


def posttraining(terms: tuple[Term, ...]) -> bool:
    """Tell terms that train on given rows from those that unlearn."""
    return bool(read_by(terms) & set(POST_TRAINING))


def check_purpose(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Refuse terms that neither unlearn nor post-train, or do both at once."""
    read = read_by(terms)
    ours, others = sorted(read & set(POST_TRAINING)), sorted(read - set(POST_TRAINING))
    if ours and others:
        raise ValueError(
            f"terms are on {', '.join(ours)} and on {', '.join(others)}; a recipe either "
            "post-trains (chosen, rejected, text) or unlearns (forget, retain)"
        )
    if others and not any(rows_of(stream) == "forget" for stream in others):
        raise ValueError(
            "no term is on forget, so nothing would be forgotten; give one `on: forget`"
        )
    return terms
