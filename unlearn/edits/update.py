"""What an edit has added to the weights, as a file that can be added again to a later model."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.models import weights_hash
from unlearn.runs import write_tensors

FORMAT = "unlearn-update-1"


@dataclass(frozen=True)
class Update:
    """Σ of an edit's steps by name of the weight, as the model lays it out, and what it is about.

    ``about`` holds the name of the edit, its hyperparameters, and the hash of the weights that it
    began with (``start``).
    """

    weights: Mapping[str, Tensor]
    about: Mapping[str, Any]


def save_update(update: Update, path: Path) -> None:
    """Write an update, completely or not at all."""
    metadata = {"format": FORMAT, "about": json.dumps(dict(update.about))}
    tensors = {name: one.detach().cpu().contiguous() for name, one in update.weights.items()}
    write_tensors(path, tensors, metadata)


def load_update(path: Path) -> Update:
    """Read an update.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    hint = "give the update.safetensors of a run whose recipe has an edit and no terms"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"'{path}' holds no update", hint)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read '{path}': {error}", hint) from error
    return Update(tensors, json.loads(metadata["about"]))


@torch.no_grad()
def reapply(model: Any, update: Update, *, scale: float) -> Any:
    """Add an update, times ``scale``, to a model of the same shape: in fp32, rounded once.

    With scale 1 and the weights the edit began with, the result is the edited model, bit for bit.
    After later training it may be too much: measure, and begin with a quarter.

    Raises:
        UserError: the model has other weights, or other shapes.
    """
    if not math.isfinite(scale):
        raise UserError(f"scale {scale} given", "give a finite number, for instance 0.25")
    own = dict(plain(model).named_parameters())
    for name, change in update.weights.items():
        if name not in own:
            raise UserError(
                f"the update changes '{name}', which this model does not have",
                "give a model of the architecture that the update was made for",
            )
        if own[name].shape != change.shape:
            ours, theirs = (list(one.shape) for one in (own[name], change))
            raise UserError(
                f"the update changes '{name}' of shape {theirs}, which is {ours} here",
                "give a model of the size that the update was made for",
            )
    for name, change in update.weights.items():
        weight = own[name]
        moved = weight.to(change.dtype) + scale * change.to(weight.device)
        weight.copy_(moved)
    return model


def is_start(model: Any, update: Update) -> bool:
    """Tell whether these are the weights that the edit began with."""
    return bool(update.about.get("start") == weights_hash(plain(model)))
