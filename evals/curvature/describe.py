"""What a file of curvature holds, as plain values: terminal, page and JSON say the same."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.curvature.damping import Damping
from unlearn.curvature.fit import Curvature, too_few
from unlearn.curvature.spectrum import Extent, LayerSpectrum, LayerTotals

FORMAT = "unlearn-curvature-report/1"
SETTINGS = ("curvature", "fisher", "label_draws", "max_factor_dim", "seed")
NAMED = 4
"""Layers that a note names."""


def describe(
    path: Path, curvature: Curvature, layers: Sequence[LayerTotals], damping: Damping | None = None
) -> dict[str, Any]:
    """Put together what is known of a file and of its layers; what is not finite is None.

    With :func:`~unlearn.curvature.spectrum.totals` it is the short form, without eigenvalues.
    """
    counts, identity = curvature.counts, curvature.identity
    widest = max(size for one in layers for size in one.shape if size is not None)
    whole = (
        None if any(one.trace is None for one in layers) else sum(one.trace or 0 for one in layers)
    )
    names = short_names([one.name for one in layers])
    doubt = too_few(counts.labels, widest)
    return {
        "format": FORMAT,
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "curvature": layers[0].kind,
        "model_sha256": identity.get("model"),
        "rows_sha256": identity.get("rows"),
        "settings": {key: identity[key] for key in SETTINGS if key in identity},
        "tokens": counts.labels,
        "positions": counts.tokens,
        "rows": counts.rows,
        "widest": widest,
        "tokens_per_dimension": counts.labels / widest,
        "trace": whole,
        "damping": damping and str(damping),
        "warnings": [doubt] if doubt else [],
        "notes": list(_notes(layers, names)),
        "layers": [_layer(one, names[one.name], whole) for one in layers],
    }


def _layer(one: LayerTotals, short: tuple[int | None, str], whole: float | None) -> dict[str, Any]:
    block, kind = short
    found: dict[str, Any] = {
        "name": one.name,
        "block": block,
        "layer": kind,
        "shape": list(one.shape),
        "inputs_trace": one.inputs_trace,
        "outputs_trace": one.outputs_trace,
        "trace": one.trace,
        "share": None if one.trace is None or not whole else one.trace / whole,
        "bytes": one.bytes,
    }
    if not isinstance(one, LayerSpectrum):
        return found
    return found | {
        "effective_rank": one.effective_rank,
        "damping": one.damping,
        "damping_to_median": finite(one.damping_to_median),
        "eigenvalues": _extent(one.eigenvalues),
        "damped": _extent(one.damped),
        "curves": {name: vars(curve) for name, curve in one.curves.items()},
    }


def _extent(one: Extent) -> dict[str, float | None]:
    return {
        **vars(one),
        "condition": finite(one.condition),
        "condition_to_median": finite(one.condition_to_median),
    }


def _notes(
    layers: Sequence[LayerTotals], names: Mapping[str, tuple[int | None, str]]
) -> Iterator[str]:
    """Say how the figures are to be read, where that is not plain."""
    if layers[0].kind == "act":
        yield (
            "act knows inputs alone: figures are those of A, and no layer has a share of the trace"
        )
    governed = [one.name for one in layers
                if isinstance(one, LayerSpectrum) and one.damping_to_median > 1]  # fmt: skip
    if governed:
        said = [" ".join(str(part) for part in names[one] if part is not None) for one in governed]
        more = f" and {len(said) - NAMED} more" if len(said) > NAMED else ""
        yield (
            f"λ is above the median eigenvalue in {len(governed)} of {len(layers)} layers "
            f"({', '.join(said[:NAMED])}{more}): there damping, not curvature, governs more than "
            "half of the directions"
        )


def finite(value: float) -> float | None:
    """Give a number that JSON has; None for the others."""
    return value if math.isfinite(value) else None


def short_names(names: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Give the number of the block and what the layer is called in it, as short as stays unique.

    ``model.layers.3.mlp.up_proj`` is (3, ``up_proj``); GPT-2 has ``attn.c_proj`` and
    ``mlp.c_proj``.
    """
    split = {name: _split(name) for name in names}
    kinds = {kind for _, kind in split.values()}
    last = Counter(kind.rpartition(".")[2] for kind in kinds)

    def short(kind: str) -> str:
        word = kind.rpartition(".")[2]
        return word if last[word] == 1 else kind

    return {name: (block, short(kind)) for name, (block, kind) in split.items()}


def _split(name: str) -> tuple[int | None, str]:
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (None, name)


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say in pairs of words what the file is about."""
    settings = found["settings"]
    said = [
        ("file", f"{found['file']} ({in_bytes(found['file_bytes'])})"),
        ("fitted to", f"{found['tokens']:,} loss tokens of {found['rows']:,} rows, "
         f"{found['tokens_per_dimension']:.1f} per dimension of the widest factor "
         f"({found['widest']:,})"),
        ("curvature", found["curvature"]),
    ]  # fmt: skip
    if settings:
        said.append(("labels", _labels(settings)))
    for name, key in (("model", "model_sha256"), ("rows", "rows_sha256")):
        if found[key]:
            said.append((name, f"sha256 {found[key][:16]}…"))
    if found["trace"] is not None:
        said.append(("trace of H", f"{compact(found['trace'])} over {len(found['layers'])} layers"))
    return said


def _labels(settings: Mapping[str, Any]) -> str:
    if settings["fisher"] == "empirical":
        return "those of the rows"
    draws = settings["label_draws"]
    how = " by importance" if settings["fisher"] == "importance" else ""
    return f"drawn from the model{how}, {draws} set{'s' * (draws > 1)}, seed {settings['seed']}"


def compact(value: float | None) -> str:
    """Write a number in at most seven characters; a dash for none."""
    if value is None:
        return "–"
    if value == 0 or 0.01 <= abs(value) < 9999.5:
        return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def cells(one: Mapping[str, Any]) -> dict[str, str]:
    """Write the figures of a layer for a table; those about eigenvalues where they are known."""
    share, block = one["share"], one["block"]
    written = {
        "block": "" if block is None else str(block),
        "layer": one["layer"],
        "shape": shape(one),
        "inputs_trace": compact(one["inputs_trace"]),
        "outputs_trace": compact(one["outputs_trace"]),
        "share": "–" if share is None else f"{100 * share:.1f} %",
        "bytes": in_bytes(one["bytes"]),
    }
    if "eigenvalues" not in one:
        return written
    there = one["eigenvalues"]["largest"] > 0

    def quotient(value: float | None) -> str:
        return "∞" if value is None and there else compact(value)

    return written | {
        "effective_rank": compact(one["effective_rank"]),
        "damping": compact(one["damping"]),
        "damping_to_median": quotient(one["damping_to_median"]),
        "to_median": quotient(one["eigenvalues"]["condition_to_median"]),
        "damped_to_median": quotient(one["damped"]["condition_to_median"]),
        "to_smallest": quotient(one["eigenvalues"]["condition"]),
        "damped_to_smallest": quotient(one["damped"]["condition"]),
    }


def in_bytes(number: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"


def shape(one: Mapping[str, Any]) -> str:
    """Write the shape of a weight as outputs × inputs."""
    out, inputs = one["shape"]
    return f"{'?' if out is None else out}×{inputs}"
