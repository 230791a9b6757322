"""Features of a dictionary chosen on named models and rows, as a table that a person can judge."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlearn import models
from unlearn.data import Template, encode, load_rows, pad_token_id
from unlearn.edits.sae import front_of
from unlearn.kinds import load_config, require_plain
from unlearn.recipes.inputs import check_model_folder
from unlearn.runs import versions, write_json
from unlearn.sae.candidates import FORMAT, candidates, placed
from unlearn.sae.selection import Rows

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Sets:
    """Rows to forget and to keep, and how they become text: as in a recipe's ``data``."""

    forget: str
    retain: str
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    max_length: int = 512

    def read(self, source: models.ModelSource, tokenizer: Any) -> tuple[Rows, Rows]:
        """Read and tokenise both."""
        template = Template.for_tokenizer(tokenizer, self.template)
        front, pad_id = front_of(tokenizer), pad_token_id(tokenizer)
        found = []
        for name in (self.forget, self.retain):
            rows = load_rows(name, columns=self.columns, offline=source.offline)
            examples = encode(rows, tokenizer, template, max_length=self.max_length, source=name)
            found.append(Rows(examples, front, pad_id))
        used = {token for rows in found for one in rows.examples for token in one.input_ids}
        models.check_vocabulary(source, used | {pad_id})
        return found[0], found[1]


def select(  # noqa: PLR0913 - each is an option of the command
    source: models.ModelSource,
    dictionaries: Sequence[str],
    sets: Sets,
    *,
    features: int = 20,
    tau: float = 0.01,
    exclude: Collection[int] = (),
    layer: int | None = None,
    emit: Emit = lambda event: None,
) -> dict[str, Any]:
    """Choose features of dictionaries of a model as the edit ``sae`` would, on all retain rows.

    Raises:
        UserError: whatever is wrong with the model, the dictionaries or the rows; nothing is found.
    """
    check_model_folder(source.path)
    models.check_source(source)
    require_plain(source)
    emit({"event": "stage", "stage": "reading the texts"})
    tokenizer = models.load_tokenizer(source)
    forget, retain = sets.read(source, tokenizer)
    places = placed(dictionaries, load_config(source), layer)
    emit({"event": "stage", "stage": "load"})
    model = models.load_model(source)
    emit({"event": "stage", "stage": "choosing features"})

    def progress(done: int, total: int) -> None:
        emit({"event": "progress", "what": "rows", "done": done, "total": total})

    described = []
    for place in places:
        moved = place.to(model.get_input_embeddings().weight.device)
        found = candidates(
            model, moved, forget, retain,
            number=features, taus=(tau,), exclude=exclude, progress=progress,
        )  # fmt: skip
        described.append(found.described(found.first(features, tau), forget, tokenizer))
    return {
        "format": FORMAT,
        "model": source.path,
        "forget": sets.forget,
        "retain": sets.retain,
        "tau": tau,
        "exclude": sorted(exclude),
        "dictionaries": described,
        "versions": versions(),
    }


def write(found: Mapping[str, Any], path: Path) -> None:
    """Write chosen features to a file that the edit takes as ``selected``."""
    write_json(path, dict(found))
