"""Kinds of model folders: a plain model, or one that is made of a base and something beside it."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from unlearn.errors import UserError

if TYPE_CHECKING:
    from unlearn.models import ModelSource

KINDS = {
    "uld_config.json": "unlearn.assistant.artefact",
    "sae_clamp.json": "unlearn.sae.artefact",
    "mtp_config.json": "unlearn.mtp.storage",
}
"""File that marks a folder of another kind -> the module that knows it.

Each says in ``WHAT`` what such a folder is, and has ``check(source)``, ``base_of(source)``,
``load_composed(source, device=…)`` and ``holds(model)``; one that can hold a model in memory also
has ``save_composed(model, tokenizer, folder, base)``. They build upon the loading of plain models,
which finds them here by name, and only when it meets such a folder.
"""


def kind_of(source: "ModelSource") -> Any | None:
    """Give the module that knows a folder of another kind; None for a plain model."""
    marks = (module for mark, module in KINDS.items() if (Path(source.path) / mark).is_file())
    name = next(marks, None)
    return importlib.import_module(name) if name else None


def kind_in_memory(model: Any) -> Any | None:
    """Give the module that saves a model of another kind; None for a plain one."""
    modules = map(importlib.import_module, KINDS.values())
    return next((module for module in modules if module.holds(model)), None)


def base_of(source: "ModelSource") -> "ModelSource":
    """Give the plain model behind a source: its base, or the source itself."""
    kind = kind_of(source)
    return kind.base_of(source) if kind else source


def require_plain(source: "ModelSource") -> None:
    """Refuse to change a model that is not one set of weights.

    Raises:
        UserError: names its base.
    """
    if kind := kind_of(source):
        raise UserError(
            f"'{source.path}' is {kind.WHAT}, which cannot be changed again",
            f"give its base, {base_of(source).path}",
        )


def load_config(source: "ModelSource") -> Any:
    """Read the configuration of a model, or of its base."""
    base = base_of(source)
    return AutoConfig.from_pretrained(base.path, **base.arguments())


def weight_files(source: "ModelSource") -> list[Path]:
    """List the local weight files: those in the folder, and those of its base when it has one."""
    base, folder = base_of(source), Path(source.path)
    if base is source:
        return sorted(folder.glob("*.safetensors"))
    return sorted([*Path(base.path).glob("*.safetensors"), *folder.rglob("*.safetensors")])
