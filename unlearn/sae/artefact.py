"""Clamps on disk: a small folder that names the model they are for, with the rows of their latents.

``sae_clamp.json`` (what the base is, what is clamped to what), ``sae_clamp.safetensors`` and the
tokenizer. There is no ``config.json`` and no model file, so that transformers refuses the folder
instead of loading a model that has forgotten nothing.

What is forgotten so is suppressed and not erased: the base, which is needed too, knows all of it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unlearn import models
from unlearn.bases import Base, content_of, recorded, source_of
from unlearn.errors import UserError
from unlearn.runs import contents, open_tensors, versions, write_json, write_tensors
from unlearn.sae.clamp import MODES, Clamp
from unlearn.sae.clamped import found as clamps_in
from unlearn.sae.clamped import install
from unlearn.sae.dictionary import KINDS

CONFIG, WEIGHTS = "sae_clamp.json", "sae_clamp.safetensors"
FORM = "unlearn-sae-clamp-1"
FORMAT = 1
"""Raise when the meaning of the folder changes."""
WHAT = "a base with clamped features of a sparse autoencoder"


@dataclass(frozen=True)
class Clamping:
    """What ``sae_clamp.json`` says, checked."""

    base: Base
    layers: tuple[Mapping[str, Any], ...]
    front: tuple[int, ...]
    clamps_sha256: str

    @classmethod
    def read(cls, source: models.ModelSource) -> "Clamping":
        """Read a folder; its base is loaded in the same way as the folder.

        Raises:
            UserError: the file is damaged, or made by a later version.
        """
        with content_of(Path(source.path) / CONFIG, FORMAT) as found:
            layers = tuple(_checked(one) for one in found["layers"])
            front = tuple(int(one) for one in found["front"])
            return cls(Base.named(found, source), layers, front, str(found["clamps_sha256"]))


def _checked(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse an entry that does not name a kind, a mode and numbers."""
    if about["kind"] not in KINDS or about["mode"] not in MODES:
        raise ValueError(f"kind {about['kind']!r}, mode {about['mode']!r}")
    numbers = [about["layer"], about["offset"], about["factor"], *about["features"]]
    if not all(isinstance(one, int | float) and one >= 0 for one in numbers):
        raise ValueError("a layer, feature or strength is no number of at least 0")
    return about


def base_of(source: models.ModelSource) -> models.ModelSource:
    """Give the base that a folder names."""
    return Clamping.read(source).base.source


def check(source: models.ModelSource) -> None:
    """Refuse a folder that cannot be loaded; reads no weights of the base.

    Raises:
        UserError: no base where the folder says, or damaged files.
    """
    found = Clamping.read(source)
    _require_unchanged(Path(source.path), found)
    found.base.check(source.path, CONFIG)


def _require_unchanged(folder: Path, found: Clamping) -> None:
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"'{folder}' has no {WEIGHTS}", "copy it again")
    models.check_safetensors(weights)
    if _digest(weights, found.layers, found.front) != found.clamps_sha256:
        raise UserError(
            f"'{weights}' and what {CONFIG} says of it have changed since they were written",
            f"copy the folder again; base_model alone may be changed in {CONFIG}",
        )


def load_composed(
    folder: models.ModelSource | str | Path,
    base: str | None = None,
    *,
    device: str | None = None,
    dtype: models.Dtype = "auto",
) -> Any:
    """Load a base and put its clamps into it.

    ``base`` says where the base is now, when it is not where the folder says.

    Raises:
        UserError: the base is missing, has other weights or another tokenizer.
    """
    source = source_of(folder, dtype)
    found = Clamping.read(source)
    if base is None:
        check(source)
    else:
        _require_unchanged(Path(source.path), found)
    loaded = found.base.at(base).loaded(source.path, CONFIG, device=device)
    return install(loaded, _clamps(Path(source.path) / WEIGHTS, found), found.front)


def holds(model: Any) -> bool:
    """Tell whether a model in memory has clamps."""
    return clamps_in(model) is not None


def save_composed(model: Any, tokenizer: Any, folder: Path, base: models.ModelSource) -> None:
    """Write the clamps of a model that was loaded from ``base``; the base itself stays where it is.

    ``folder`` is best one that is renamed when all is written: ``sae_clamp.json`` comes last.
    """
    module = clamps_in(model)
    assert module is not None
    tensors = {
        _name(place, name): one.cpu().contiguous()
        for place, clamp in enumerate(module.clamps)
        for name, one in clamp.tensors().items()
    }
    tokenizer.save_pretrained(folder)
    write_tensors(folder / WEIGHTS, tensors, {"format": FORM})
    layers, front = [clamp.about() for clamp in module.clamps], list(module.front)
    content = {
        "format": FORMAT,
        **recorded(base, tokenizer),
        "clamps_sha256": _digest(folder / WEIGHTS, layers, front),
        "front": front,
        "layers": layers,
        "versions": versions(),
    }
    write_json(folder / CONFIG, content)


def _clamps(path: Path, found: Clamping) -> list[Clamp]:
    """Read the weights of the clamps.

    Raises:
        UserError: some are missing or do not fit together.
    """
    with open_tensors(path, FORM, "clamps", "copy the folder again") as (file, _):
        weights = contents(file)
    try:
        return [
            Clamp.rebuilt(about, _of_clamp(place, weights))
            for place, about in enumerate(found.layers)
        ]
    except (LookupError, TypeError) as error:
        message = f"'{path}' does not hold what {CONFIG} names: {error!r}"
        raise UserError(message, "copy the folder again") from error


def _of_clamp(place: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = _name(place, "")
    return {n.removeprefix(start): one for n, one in weights.items() if n.startswith(start)}


def _name(place: int, name: str) -> str:
    return f"{place}.{name}"


def _digest(path: Path, layers: Sequence[Mapping[str, Any]], front: Sequence[int]) -> str:
    """Hash the weights of clamps with what is said of them: a model is never silently un-edited."""
    said = json.dumps([[dict(one) for one in layers], list(front)], sort_keys=True)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(said.encode())
    return digest.hexdigest()
