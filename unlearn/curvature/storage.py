"""Fitted curvature on disk: one safetensors file that knows which model, rows and settings."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.factors import Counts, LayerCurvature
from unlearn.curvature.fit import Curvature
from unlearn.errors import UserError
from unlearn.runs import contents, open_tensors, write_tensors

FORMAT = "unlearn-curvature-1"
BLOCKS = ("inputs", "outputs", "input_basis", "output_basis")
WORDS = {
    "model": "another model",
    "rows": "other rows",
    "layers": "other layers",
}
"""What a part of the identity that differs means."""
ANEW = "give another file, or remove this one: it is then fitted anew"
SHOWN = 12
"""Digits of a hash that tell two apart in a message."""


def save_curvature(curvature: Curvature, path: Path) -> None:
    """Write curvature to a file, completely or not at all; shared input factors once."""
    metadata = {
        "format": FORMAT,
        "identity": json.dumps(dict(curvature.identity)),
        "counts": json.dumps(asdict(curvature.counts)),
        "layers": json.dumps({n: [one.group, one.trace] for n, one in curvature.layers.items()}),
    }
    write_tensors(path, _tensors(curvature), metadata)


def load_curvature(path: Path, identity: Mapping[str, Any], *, device: Any = "cpu") -> Curvature:
    """Read curvature that belongs to this model, these rows and these settings.

    Raises:
        UserError: it is no such file, or it belongs to something else, which is named.
    """
    return _read(path, identity, ANEW, device)


def check_curvature(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a file that :func:`load_curvature` would refuse; reads no factors.

    Raises:
        UserError: it is no such file, or it belongs to something else, which is named.
    """
    with open_tensors(path, FORMAT, "curvature", ANEW) as (_, about):
        _require_same(path, json.loads(about["identity"]), identity, ANEW)


def read_curvature(path: Path, *, device: Any = "cpu") -> Curvature:
    """Read curvature whatever it belongs to, which its ``identity`` says.

    Raises:
        UserError: it is no such file.
    """
    hint = "give a file that `unlearn curvature fit`, or a run with edit.factors, has written"
    return _read(path, None, hint, device)


def _read(path: Path, identity: Mapping[str, Any] | None, hint: str, device: Any) -> Curvature:
    with open_tensors(path, FORMAT, "curvature", hint, device=device) as (file, about):
        stored = json.loads(about["identity"])
        if identity is not None:
            _require_same(path, stored, identity, hint)
        tensors = contents(file)
    layers = {
        name: _layer(tensors, name, group, trace)
        for name, (group, trace) in json.loads(about["layers"]).items()
    }
    return Curvature(layers, Counts(**json.loads(about["counts"])), stored)


def _require_same(
    path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], hint: str
) -> None:
    for key in [*wanted, *(key for key in stored if key not in wanted)]:
        theirs, ours = stored.get(key), wanted.get(key)
        if theirs == ours:
            continue
        if key in WORDS:
            apart = f"{_brief(theirs)}, not {_brief(ours)}"
            raise UserError(f"'{path}' holds the curvature of {WORDS[key]}: {apart}", hint)
        raise UserError(f"'{path}' was fitted with {key} {theirs}, not {ours}", hint)


def _brief(value: Any) -> str:
    """Write a hash, or a list of layers, for people."""
    if isinstance(value, list):
        return f"{len(value)} from {value[0]} to {value[-1]}" if value else "none"
    return f"{str(value)[:SHOWN]}…"


def _tensors(curvature: Curvature) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in curvature.layers.items():
        for kind in BLOCKS:
            blocks: Blocks | None = getattr(layer, kind)
            for place, part in enumerate(blocks.parts if blocks else ()):
                found[f"{_owner(name, layer.group, kind)}.{kind}.{place}"] = part.contiguous()
        if layer.eigenvalues is not None:
            found[f"{name}.eigenvalues"] = layer.eigenvalues.contiguous()
    return found


def _owner(name: str, group: str, kind: str) -> str:
    return group if kind.startswith("input") else name


def _layer(
    tensors: Mapping[str, Tensor], name: str, group: str, trace: float | None
) -> LayerCurvature:
    def blocks(kind: str) -> Blocks | None:
        prefix = f"{_owner(name, group, kind)}.{kind}."
        parts: list[Tensor] = []
        while f"{prefix}{len(parts)}" in tensors:
            parts.append(tensors[f"{prefix}{len(parts)}"])
        return Blocks(tuple(parts)) if parts else None

    found = {kind: blocks(kind) for kind in BLOCKS}
    return LayerCurvature(
        group, **found, eigenvalues=tensors.get(f"{name}.eigenvalues"), trace=trace
    )
