"""What an edit has added to the weights, as a file that can be added again to a later model."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlearn.edits.low_rank import Factors, LowRank, truncated
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.models import weights_hash
from unlearn.runs import contents, open_tensors, write_tensors

FORMAT = "unlearn-update-1"
HINT = "give the update.safetensors of a run whose recipe has an edit and no terms"
PARTS = ("left", "right", "places", "remainders")
"""What stands behind the ``:`` of a tensor's name in the file, where it is not a whole change."""


@dataclass(frozen=True)
class Remainder:
    """What is to be added on top at a few places, so that sums end exactly where they should."""

    places: Tensor
    """Into the flattened weight."""
    values: Tensor


@dataclass(frozen=True)
class Update:
    """Σ of an edit's steps by name of the weight, as the model lays it out, and what it is about.

    ``about`` holds the name of the edit, its hyperparameters, and the hash of the weights that it
    began with (``start``). ``weights`` may keep factors (:class:`LowRank`).
    """

    weights: Mapping[str, Tensor]
    about: Mapping[str, Any]
    remainders: Mapping[str, Remainder] = field(default_factory=dict)

    @property
    def kept(self) -> Mapping[str, Tensor | Factors]:
        """The changes as they are kept: whole, or as factors."""
        return self.weights.kept if isinstance(self.weights, LowRank) else self.weights

    def added_to(self, weight: Tensor, name: str, scale: float) -> Tensor:
        """Give start + scale · change, in at least fp32."""
        change = self.kept[name]
        if isinstance(change, Factors):
            there = Factors(change.left.to(weight.device), change.right.to(weight.device))
            moved = weight.to(change.dtype) + there.times(scale)
        else:
            moved = weight.to(change.dtype) + scale * change.to(weight.device)
        if name in self.remainders:
            rest = self.remainders[name]
            more = scale * rest.values.to(weight.device)
            moved.view(-1)[rest.places.to(weight.device).long()] += more
        return moved

    def scaled(self, scale: float) -> "Update":
        """Give the same update at another length: added once, it does what this does at scale."""
        kept = {
            name: one.scaled(scale) if isinstance(one, Factors) else scale * one
            for name, one in self.kept.items()
        }
        rest = {
            name: Remainder(one.places, scale * one.values) for name, one in self.remainders.items()
        }
        return Update(LowRank(kept), self.about, rest)

    def of_rank(self, rank: int) -> "Update":
        """Give the nearest update of this rank (see :func:`truncated`); ``about`` tells how near.

        Added to the start it no longer gives the edited model, so remainders are left out.
        """
        weights, error = truncated(self.weights, rank)
        return Update(weights, {**self.about, "rank": rank, "relative_error": error})


def save_update(update: Update, path: Path) -> None:
    """Write an update, completely or not at all."""
    metadata = {"format": FORMAT, "about": json.dumps(dict(update.about))}
    tensors: dict[str, Tensor] = {}
    for name, one in update.kept.items():
        if isinstance(one, Factors):
            tensors |= {f"{name}:left": one.left, f"{name}:right": one.right}
        else:
            tensors[name] = one
    for name, rest in update.remainders.items():
        tensors |= {f"{name}:places": rest.places, f"{name}:remainders": rest.values}
    laid_out = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    write_tensors(path, laid_out, metadata)


def load_update(path: Path) -> Update:
    """Read an update.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    with open_tensors(path, FORMAT, "update", HINT) as (file, metadata):
        about, tensors = json.loads(metadata["about"]), contents(file)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = _split(key)
        parts.setdefault(name, {})[part] = tensor
    kept: dict[str, Tensor | Factors] = {
        name: Factors(one["left"], one["right"]) if "left" in one else one[""]
        for name, one in parts.items()
    }
    rest = {
        name: Remainder(one["places"], one["remainders"])
        for name, one in parts.items()
        if "places" in one
    }
    whole = {name: one for name, one in kept.items() if isinstance(one, Tensor)}
    return Update(whole if len(whole) == len(kept) else LowRank(kept), about, rest)


def update_shapes(path: Path) -> dict[str, list[int]]:
    """Read the shapes of the weights that an update changes, and nothing more of the file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    with open_tensors(path, FORMAT, "update", HINT) as (file, _):
        found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    shapes = {}
    for key, shape in found.items():
        name, part = _split(key)
        if part == "left":
            shapes[name] = [shape[0], found[f"{name}:right"][1]]
        elif not part:
            shapes[name] = shape
    return shapes


def _split(key: str) -> tuple[str, str]:
    name, _, part = key.rpartition(":")
    return (name, part) if part in PARTS else (key, "")


def check_fits(model: Any, shapes: Mapping[str, Iterable[int]]) -> None:
    """Refuse a model that an update of these shapes cannot be added to; its weights are not read.

    Raises:
        UserError: adapters, 4-bit weights, other weights, or other shapes.
    """
    if has_adapters(model):
        raise UserError(
            "the model has adapters, and an update changes the weights themselves",
            "merge the adapters first",
        )
    own = dict(plain(model).named_parameters())
    for name, shape in shapes.items():
        if name not in own:
            raise UserError(
                f"the update changes '{name}', which this model does not have",
                "give a model of the architecture that the update was made for",
            )
        if not own[name].is_floating_point():
            raise UserError(
                f"'{name}' is quantised: an update cannot be added to 4-bit weights",
                "load the model without quantize",
            )
        ours, theirs = list(own[name].shape), list(shape)
        if ours != theirs:
            raise UserError(
                f"the update changes '{name}' of shape {theirs}, which is {ours} here",
                "give a model of the size that the update was made for",
            )


def has_adapters(model: Any) -> bool:
    """Tell whether adapters lie on a model, put there by PEFT or found in its folder."""
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    return bool(loaded) or hasattr(model, "peft_config")


@torch.no_grad()
def reapply(model: Any, update: Update, *, scale: float) -> Any:
    """Add an update, times ``scale``, to a model of the same shape: in fp32, rounded once.

    With scale 1 and the weights the edit began with, the result is the edited model, bit for bit
    (not where the update is of low rank). After later training it may be too much: measure, and
    begin with a quarter, or let :func:`unlearn.edits.reapply.search_scale` do both.

    Raises:
        UserError: the model has other weights, or other shapes.
    """
    check_scale(scale)
    check_fits(model, {name: one.shape for name, one in update.kept.items()})
    own = dict(plain(model).named_parameters())
    for name in update.kept:
        own[name].copy_(update.added_to(own[name], name, scale))
    return model


def check_scale(scale: float) -> None:
    """Refuse a scale that is no finite number.

    Raises:
        UserError: as said.
    """
    if not math.isfinite(scale):
        raise UserError(f"scale {scale} given", "give a finite number, for instance 0.25")


def is_start(model: Any, update: Update) -> bool:
    """Tell whether these are the weights that the edit began with."""
    return bool(update.about.get("start") == weights_hash(plain(model)))


@torch.no_grad()
def changed_share(start: Mapping[str, Tensor], edited: Mapping[str, Tensor]) -> float:
    """Give the share of the entries of ``edited`` whose stored value is not that of ``start``.

    In bf16, where a value has 8 binary digits, an update much smaller than 1/256 of the weights is
    rounded away at many of them: then this is well below 1.
    """
    differing = sum(int((one != start[name].to(one)).sum()) for name, one in edited.items())
    return differing / max(1, sum(one.numel() for one in edited.values()))


@torch.no_grad()
def rounding(
    start: Mapping[str, Tensor], edited: Mapping[str, Tensor], added: Mapping[str, Tensor]
) -> float:
    """Give how much of what was added rounding took or put on top: ‖edited − (start + Δ)‖ / ‖Δ‖.

    It comes from the type that weights are stored in: about 0 in fp32, and near 1 in bf16 where
    an update is too small for it.
    """
    lost = whole = 0.0
    for name, change in added.items():
        moved = start[name].to(change) + change
        lost += float((edited[name].to(change) - moved).double().square().sum())
        whole += float(change.double().square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def stored_change(
    start: Mapping[str, Tensor], edited: Mapping[str, Tensor], added: Mapping[str, Tensor]
) -> dict[str, float]:
    """Say what of an update is left in the weights as they are stored, for results."""
    return {
        "changed_share": changed_share(start, edited),
        "rounding": rounding(start, edited, added),
    }
