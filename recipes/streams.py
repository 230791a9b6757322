"""The sets of rows that a recipe names, read and tokenised."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from unlearn.data import Example, Template, encode, load_rows, load_variants
from unlearn.data.answers import Draws
from unlearn.data.pairs import check_sides, sides_of
from unlearn.data.rows import check_rows, rename_columns
from unlearn.data.sources import load_any_rows
from unlearn.recipes.schema import Recipe
from unlearn.recipes.sections import ExtraSection


@dataclass(frozen=True)
class Stream:
    """A set of rows as given, which are measured, and as tokenised, which is trained on.

    ``draws`` tells which other answer is drawn when. ``extra`` counts the examples at the end that
    were made of other rows; they are not measured.
    """

    source: str
    rows: list[dict[str, Any]]
    examples: list[Example]
    draws: Draws | None = None
    extra: int = 0

    def sha256(self) -> str:
        """Hash the tokenised rows: what the model is actually trained on."""
        tokens = json.dumps([one.hashed() for one in self.examples])
        return hashlib.sha256(tokens.encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Say where the rows came from, how many there are and their hash."""
        found = {"source": self.source, "rows": len(self.rows), "sha256": self.sha256()}
        return found | ({"extra": self.extra} if self.extra else {})


def read_stream(
    recipe: Recipe, name: str, tokenizer: Any, template: Template, *, offline: bool = False
) -> Stream | None:
    """Read and tokenise a set of rows, with what is added to it; None: not named."""
    data, spec = recipe.data, getattr(recipe.data, name)
    if spec is None:
        return None
    how = {"tokenizer": tokenizer, "template": template, "max_length": data.max_length}
    rows = load_rows(spec, columns=data.columns, offline=offline)
    examples = encode(rows, source=spec, **how)
    parts = getattr(data, f"{name}_extra", ())
    more = [one for part in parts for one in _extra(part, offline=offline, **how)]
    return Stream(spec, rows, examples + more, extra=len(more))


def _extra(section: ExtraSection, *, offline: bool, **how: Any) -> list[Example]:
    """Read and tokenise rows that are only trained on."""
    rows = load_variants(
        section.source, columns=section.columns, take=section.take, offline=offline
    )
    return encode(rows, source=section.source, **how)


def post_training_streams(
    recipe: Recipe, tokenizer: Any, template: Template, *, offline: bool = False
) -> dict[str, Stream]:
    """Read and tokenise what is post-trained on: both sides of pairs, and text.

    ``text`` stands for the chosen answers where the recipe names pairs alone. ``heldout`` is only
    measured.
    """
    data = recipe.data
    how: dict[str, Any] = {"tokenizer": tokenizer, "template": template}
    how["max_length"] = data.max_length
    found = {}
    if data.pairs is not None:
        rows = rename_columns(load_any_rows(data.pairs, offline=offline), data.columns, data.pairs)
        for side, one in sides_of(rows, data.pairs).items():
            source = f"{data.pairs} ({side})"
            check_rows(one, source)
            found[side] = Stream(data.pairs, one, encode(one, source=source, **how))
        sides = {side: stream.examples for side, stream in found.items()}
        check_sides(sides, data.pairs, data.max_length)
    for name in ("text", "heldout"):
        if stream := read_stream(recipe, name, tokenizer, template, offline=offline):
            found[name] = stream
    if "text" in recipe.read_streams() and "text" not in found:
        found["text"] = found["chosen"]
    return found
