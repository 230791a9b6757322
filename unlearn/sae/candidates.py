"""Dictionaries in their places in a model, and what a person should know of latents to clamp."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from unlearn.errors import UserError
from unlearn.sae.clamp import check_features
from unlearn.sae.dictionary import Dictionary, check_fits
from unlearn.sae.firings import Firings, firings, passages
from unlearn.sae.selection import Frequencies, Progress, Rows, choose, eligible, frequencies
from unlearn.sae.storage import load_dictionary

FORMAT = 1
"""Raise when the meaning of the file of chosen features changes."""
PASSAGES = 5
"""Passages of text that are kept of each feature."""


@dataclass(frozen=True)
class Placed:
    """A dictionary, the file it came from, and the layer whose output it reads."""

    path: str
    layer: int
    dictionary: Dictionary

    @property
    def sha256(self) -> str:
        """Hash its weights, whatever file they came in."""
        digest = hashlib.sha256(self.dictionary.kind.encode())
        for name, tensor in sorted(self.dictionary.tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "Placed":
        """Give the same on another device."""
        return Placed(self.path, self.layer, self.dictionary.to(device))


def placed(paths: Sequence[str], config: Any, layer: int | None = None) -> list[Placed]:
    """Read dictionaries for a model with this configuration, lowest layer first.

    ``layer`` says what one dictionary reads whose file does not.

    Raises:
        UserError: no dictionary, one of another model, no layer known or two at the same.
    """
    text = config.get_text_config()
    if layer is not None and len(paths) > 1:
        raise UserError(f"layer={layer} given with {len(paths)} dictionaries", "leave it out")
    found = [_placed(path, text.hidden_size, text.num_hidden_layers, layer) for path in paths]
    found.sort(key=lambda one: one.layer)
    for first, second in pairwise(found):
        if first.layer == second.layer:
            message = f"'{first.path}' and '{second.path}' both read layer {first.layer}"
            raise UserError(message, "give one dictionary per layer")
    return found


def _placed(path: str, width: int, depth: int, layer: int | None) -> Placed:
    loaded = load_dictionary(path)
    check_fits(loaded, width, layer, source=path)
    own = loaded.hook.leaves if loaded.hook else None
    where = own if layer is None else layer
    if where is None:
        what = f"reads {loaded.hook}, no layer's output" if loaded.hook else "names no layer"
        raise UserError(f"'{path}' {what}", "only what leaves a layer can be clamped: set layer")
    if not 0 <= where < depth:
        raise UserError(
            f"'{path}' reads layer {where}, but the model has {depth} layers",
            "give a dictionary of this model",
        )
    return Placed(path, where, loaded)


@dataclass(frozen=True)
class Candidates:
    """Latents of one dictionary that may be clamped: how often and how strongly they fire.

    ``chosen`` lists them for every tau that was asked for, the first being the first to take.
    ``shares`` gives of each the share of forget and of retain tokens.
    """

    placed: Placed
    chosen: Mapping[float | None, tuple[int, ...]]
    shares: Mapping[int, tuple[float, float]]
    firings: Firings

    def first(self, number: int, tau: float) -> tuple[int, ...]:
        """Give the features to clamp; none where this tau admits none."""
        return self.chosen.get(tau, self.chosen.get(None, ()))[:number]

    def described(self, features: Sequence[int], rows: Rows, tokenizer: Any) -> dict[str, Any]:
        """Say in JSON what a person needs to judge these features by."""
        return {
            "path": self.placed.path,
            "sha256": self.placed.sha256,
            "layer": self.placed.layer,
            "kind": self.placed.dictionary.kind,
            "p99": self.firings.percentile(features),
            "features": [self._feature(one, rows, tokenizer) for one in features],
        }

    def _feature(self, feature: int, rows: Rows, tokenizer: Any) -> dict[str, Any]:
        of_forget, of_retain = self.shares[feature]
        texts = passages(self.firings, feature, rows, tokenizer, PASSAGES)
        return {
            "id": feature,
            "forget": of_forget,
            "retain": of_retain,
            "mean": self.firings.mean(feature),
            "examples": [asdict(one) for one in texts],
        }


def candidates(  # noqa: PLR0913 - two sets, and what decides the choice
    model: Any,
    place: Placed,
    forget: Rows,
    retain: Rows,
    *,
    number: int = 20,
    taus: Sequence[float] = (0.01,),
    exclude: Collection[int] = (),
    progress: Progress = lambda done, total: None,
) -> Candidates:
    """Choose up to ``number`` features of a dictionary by how often they fire, for every tau.

    A tau that admits none is left out, if another one does.

    Raises:
        UserError: nothing is eligible, or ``exclude`` names what there is not.
    """
    check_features(place.dictionary, sorted(exclude))
    found = frequencies(model, place.dictionary, place.layer, forget, retain, progress=progress)
    chosen: dict[float | None, tuple[int, ...]] = {}
    for tau in sorted(taus, reverse=True):  # the largest admits most: it says what is wrong
        if not chosen or eligible(found, tau, exclude).any():
            chosen[tau] = tuple(choose(found, number, tau=tau, exclude=exclude))
    every = list(dict.fromkeys(one for each in chosen.values() for one in each))
    fired = firings(model, place.dictionary, every, place.layer, forget, progress=progress)
    return Candidates(place, chosen, _shares(found, every), fired)


def _shares(found: Frequencies, features: Sequence[int]) -> dict[int, tuple[float, float]]:
    return {one: (float(found.of_forget[one]), float(found.of_retain[one])) for one in features}


def listed(
    model: Any,
    place: Placed,
    path: str,
    forget: Rows,
    *,
    exclude: Collection[int] = (),
    progress: Progress = lambda done, total: None,
) -> Candidates:
    """Take the features that a file lists (``unlearn sae select``), in its order.

    Raises:
        UserError: the file cannot be read, is of another dictionary, or lists nothing.
    """
    kept = [one for one in entry_of(path, place) if one["id"] not in exclude]
    features = [one["id"] for one in kept]
    check_features(place.dictionary, features)
    if not features:
        raise UserError(f"'{path}' lists no feature of '{place.path}'", "choose some again")
    fired = firings(model, place.dictionary, features, place.layer, forget, progress=progress)
    shares = {one["id"]: (one["forget"], one["retain"]) for one in kept}
    return Candidates(place, {None: tuple(features)}, shares, fired)


def entry_of(path: str, place: Placed) -> list[dict[str, Any]]:
    """Give what a file of chosen features lists for a dictionary.

    Raises:
        UserError: the file cannot be read, or knows only other dictionaries.
    """
    hint = "make it with: unlearn sae select"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise UserError(f"'{path}' was written by a later version", "update unlearn")
        entries = {one["sha256"]: one["features"] for one in content["dictionaries"]}
        found = entries.get(place.sha256)
        for one in found or ():
            shares = one["forget"], one["retain"]
            if not isinstance(one["id"], int) or not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"feature {one['id']!r}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"'{path}' lists no features: {error!r}", hint) from error
    if found is None:
        raise UserError(f"'{path}' was made for other dictionaries than '{place.path}'", hint)
    return list(found)
