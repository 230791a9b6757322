"""The ``data.select`` section: which part of the forget set is trained on. Imports no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from unlearn.recipes.section import Section

Selector = Literal["random", "grand", "moderate", "mink", "keyword", "worst"]

OWN: dict[str, tuple[Selector, ...]] = {
    "k": ("mink",),
    "clusters": ("moderate",),
    "parameters": ("grand",),
    "steps": ("worst",),
    "keywords": ("keyword",),
}
"""Keys that only some selectors read."""


class ChoiceSection(Section):
    """Train on a part of the forget set; all of it is still measured."""

    by: Selector | None = None
    """random, grand, moderate, mink, keyword or worst: see docs/selection.md."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the rows that is kept; with `by: keyword`, of the labelled tokens."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed of `random` and of the clusters of `moderate`; null takes the recipe's."""
    manifest: str | None = Field(default=None, min_length=1)
    """File with the rows, from `unlearn data select`, instead of `by`."""
    k: float = Field(default=0.4, gt=0, le=1)
    """mink: share of a row's tokens, the least likely ones, that its score is the mean of."""
    clusters: int = Field(default=4, ge=1)
    """moderate: clusters of k-means."""
    parameters: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """grand: weights whose gradient counts, as regular expressions; null: all that are trained."""
    steps: int | None = Field(default=None, ge=1)
    """worst: optimiser steps before rows are scored; null: one pass over the forget set."""
    keywords: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """keyword: words to train on, instead of those that the retain set lacks."""

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if (self.by is None) == (self.manifest is None):
            what = "neither by nor manifest" if self.by is None else "by and manifest both"
            options = "(--forget-select SELECTOR or --forget-indices FILE)"
            raise ValueError(f"{what} given; give one of them {options}")
        if self.manifest and self.fraction is not None:
            raise ValueError("fraction given with manifest, which names the rows itself")
        if self.keywords and self.fraction is not None:
            raise ValueError("fraction given with keywords: all places of these words are kept")
        if self.by and self.fraction is None and not self.keywords:
            raise ValueError("fraction is missing; give the share to keep, for instance 0.05")
        return self

    @field_validator("keywords")
    @classmethod
    def _words_are_words(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not all(word.strip() for word in value):
            raise ValueError("an empty keyword given; write words, for instance [Oslo, Lind]")
        return value

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        fields = type(self).model_fields
        for name, users in OWN.items():
            value = getattr(self, name)
            if self.by not in users and value != fields[name].default:
                who = f"by: {self.by}" if self.by else "manifest"
                raise ValueError(
                    f"{name} is {value!r}, but only by: {users[0]} reads it, not {who}"
                )
        return self

    def settings(self) -> dict[str, Any]:
        """Give what this choice depends on: its own keys, without those of other selectors."""
        read = [name for name, users in OWN.items() if self.by in users]
        found = {name: getattr(self, name) for name in ("by", "fraction", *read)}
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if v is not None
        }
