"""Choosing the part of the forget set that a recipe trains on, and keeping what was chosen.

What was chosen is a manifest (JSON): rows, scores, settings, hashes. A run keeps its own as
``selection.json`` and never chooses twice; another run can be given it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.keywords import Positions, masked
from unlearn.recipes.choice import ChoiceSection
from unlearn.recipes.prepare import Prepared
from unlearn.recipes.streams import Stream
from unlearn.runs import write_json
from unlearn.selection import num_kept

FORMAT = "unlearn selection 1"


@dataclass(frozen=True)
class Selected:
    """Chosen rows of a forget set (0 is the first), ascending, and where they came from.

    ``scores`` holds every row's score, the highest were kept; for keywords it is that of each
    token. ``labels`` names, per chosen row and per window of it, the places that keep their label;
    None keeps all. Hashes that are None are not checked.
    """

    indices: list[int]
    num_rows: int | None = None
    by: str | None = None
    settings: Mapping[str, Any] | None = None
    seed: int | None = None
    scores: list[float] | dict[str, float] | None = None
    labels: list[Positions] | None = None
    model_sha256: str | None = None
    rows_sha256: str | None = None
    tokens_sha256: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Selected":
        """Read a manifest, or a bare JSON list of row numbers.

        Raises:
            UserError: no such file, or it holds something else.
        """
        hint = "give a file of `unlearn data select`, or a JSON list of row numbers: [0, 7, 12]"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the selection '{path}': {error.strerror}", hint) from None
        except ValueError:
            raise UserError(f"'{path}' is not JSON", hint) from None
        if isinstance(content, list):
            content = {"indices": content}
        content = dict(content) if isinstance(content, dict) else {}
        rows = content.get("indices")
        if not isinstance(rows, list) or not rows or not all(type(row) is int for row in rows):
            raise UserError(f"'{path}' holds no row numbers", hint)
        if len(set(rows)) < len(rows) or min(rows) < 0:
            raise UserError(f"'{path}' names a row twice, or one below 0 (0 is the first)", hint)
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        labels = known.get("labels")
        order = sorted(range(len(rows)), key=rows.__getitem__)
        if labels is not None and (not isinstance(labels, list) or len(labels) != len(rows)):
            raise UserError(f"'{path}' has labels of other rows than it names", hint)
        known["labels"] = labels and [labels[place] for place in order]
        return cls(**known | {"indices": sorted(rows)})

    def write(self, path: Path) -> None:
        """Write the manifest, completely or not at all."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    def summary(self) -> dict[str, Any]:
        """Give what provenance says of it: everything but scores and labels."""
        settings = dict(self.settings or {})
        counted = {"rows": len(self.indices), "of": self.num_rows}
        found = {"by": self.by or "given rows", **settings, "seed": self.seed, **counted}
        if self.labels is not None:
            found["labels"] = sum(len(w) for windows in self.labels for w in windows)
        hashes = {"model_sha256": self.model_sha256}
        found |= {**hashes, "indices": list(self.indices)}
        return {name: value for name, value in found.items() if value is not None}


def rows_sha256(stream: Stream) -> str:
    """Hash the rows as they were read, whatever the tokenizer."""
    text = json.dumps(stream.rows, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_given(prepared: Prepared) -> Selected | None:
    """Read and check the manifest that the recipe names; None when it names none.

    Raises:
        UserError: it cannot be used for these rows.
    """
    section = prepared.recipe.data.select
    if section is None or section.manifest is None:
        return None
    path = Path(section.manifest)
    found, forget = Selected.read(path), prepared.streams["forget"]
    number = len(forget.rows)
    if found.indices[-1] >= number:
        message = f"'{path}' names row {found.indices[-1]}, but '{forget.source}' has {number} rows"
        raise UserError(message, f"row numbers go from 0 to {number - 1}")
    if found.rows_sha256 not in (None, rows_sha256(forget)):
        raise UserError(
            f"'{path}' was made for other rows than those of '{forget.source}'",
            "give the forget set it was made from, or select again",
        )
    if found.labels is not None and found.tokens_sha256 not in (None, forget.sha256()):
        raise UserError(
            f"'{path}' names tokens, and this model or template makes other tokens of the rows",
            "select again with this model and template",
        )
    return replace(found, num_rows=number)


def trained_on(prepared: Prepared, selected: Selected) -> Prepared:
    """Give the same recipe with the chosen part as the forget set it trains on.

    What is measured stays the whole set, and so does the number of optimiser steps.
    """
    forget = prepared.streams["forget"]
    kept = list(_kept(forget.examples, selected))
    streams = prepared.streams | {"forget": replace(forget, examples=kept)}
    return replace(prepared, streams=streams, whole_forget=len(forget.examples))


def _kept(examples: list[Example], selected: Selected) -> list[Example]:
    chosen = set(selected.indices)
    rows = [example for example in examples if example.row in chosen]
    if selected.labels is None:
        return rows
    windows = [places for row in selected.labels for places in row]
    pairs = zip(rows, windows, strict=True)
    return [masked(example, places) for example, places in pairs if places]


def choice_plan(prepared: Prepared) -> dict[str, Any] | None:
    """Say how much of the forget set is trained on and how often; None when it is all of it.

    Without a look at the model: for keywords the rows are not known yet.
    """
    section = prepared.recipe.data.select
    if section is None:
        return None
    given, whole = read_given(prepared), len(prepared.streams["forget"].rows)
    rows = len(given.indices) if given else _rows_kept(section, whole)
    found = {"by": section.by or "given rows", **section.settings(), "rows": rows, "of": whole}
    if rows is None:
        return found
    examples = max(1, round(len(prepared.streams["forget"].examples) * rows / whole))
    return found | _passes(prepared, examples)


def trained_part(prepared: Prepared) -> dict[str, Any]:
    """Say how often a chosen part is passed over, in how many optimiser steps."""
    return _passes(prepared, len(prepared.streams["forget"].examples))


def _passes(prepared: Prepared, examples: int) -> dict[str, Any]:
    """Give the optimiser steps, and how often they pass over so many examples.

    ``scaled_from``: the passes over the whole set that take as many steps; without it the user
    gave the number of steps.
    """
    if not prepared.recipe.trains:  # every step of an edit passes over all that was chosen
        return {"steps": prepared.steps, "passes": prepared.steps}
    training = prepared.recipe.training
    passes = prepared.steps / -(-examples // prepared.rows_per_step)
    scaled = {"scaled_from": training.num_train_epochs} if training.max_steps <= 0 else {}
    return {"steps": prepared.steps, "passes": round(passes, 2), **scaled}


def _rows_kept(section: ChoiceSection, whole: int) -> int | None:
    if section.by == "keyword":
        return None
    assert section.fraction is not None
    return num_kept(whole, section.fraction)
