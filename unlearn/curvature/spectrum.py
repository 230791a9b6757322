"""How curvature is spread over layers and directions, before and after damping.

Eigenvalues of H are in nats of KL per retain token for a unit change of the weights, twice over
(KL ≈ ½ δᵀHδ). Everything here is read off fitted factors: no model is needed.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.damping import Damping, factored
from unlearn.curvature.factors import Kind, LayerCurvature
from unlearn.curvature.fit import Curvature
from unlearn.curvature.solve import trace_correction

POINTS = 64
"""Eigenvalues kept from either end of a matrix, at distances that grow by a constant factor."""
HALVINGS = 128
"""Bisections that find a median: enough for any two float64 numbers."""

Values = Float[Tensor, "_"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spectrum:
    """Every product γ_o α_j of two lists, plus ``added``: the eigenvalues of G ⊗ A + added·I.

    Both lists are float64, ascending and not below 0. A plain list has [1] for ``outputs``. The
    products are never formed: a layer of a large model has 10⁸ of them.
    """

    inputs: Values
    outputs: Values
    added: float = 0.0

    @classmethod
    def of(cls, values: Tensor, outputs: Tensor | None = None) -> "Spectrum":
        """Sort eigenvalues; what rounding has put below 0 is 0."""

        def ascending(some: Tensor) -> Tensor:
            return some.flatten().double().clamp_min(0).sort().values

        return cls(ascending(values), ascending(values.new_ones(1) if outputs is None else outputs))

    def __len__(self) -> int:
        return len(self.inputs) * len(self.outputs)

    @property
    def largest(self) -> float:
        return float(self.inputs[-1] * self.outputs[-1]) + self.added

    @property
    def smallest(self) -> float:
        return float(self.inputs[0] * self.outputs[0]) + self.added

    @property
    def median(self) -> float:
        """The middle eigenvalue; of an even number the lower of the two."""
        return self._lowest((len(self) + 1) // 2) + self.added

    @property
    def sum(self) -> float:
        return float(self.inputs.sum() * self.outputs.sum()) + len(self) * self.added

    @property
    def effective_rank(self) -> float:
        """(Σλ)² / Σλ²: how many equal eigenvalues would be spread like these; 0 without any."""
        products = float(self.inputs.sum() * self.outputs.sum())
        squares = float(self.inputs.square().sum() * self.outputs.square().sum())
        squares += 2 * self.added * products + len(self) * self.added**2
        return self.sum**2 / squares if squares else 0.0

    def _lowest(self, place: int) -> float:
        """Find the product that ``place`` of them do not exceed, by counting below a bound."""
        rows = self.outputs[self.outputs > 0]
        zeros = len(self) - len(rows) * int((self.inputs > 0).sum())
        if place <= zeros:
            return 0.0
        low = max(float(self.inputs[self.inputs > 0][0] * rows[0]), sys.float_info.min)
        high = max(float(self.inputs[-1] * rows[-1]), low)
        certain = (len(self.outputs) - len(rows)) * len(self.inputs)
        low, high = low * (1 - 1e-15), high * (1 + 1e-15)
        for _ in range(HALVINGS):
            middle = math.sqrt(low) * math.sqrt(high)
            if not low < middle < high:
                break
            below = torch.searchsorted(self.inputs, middle / rows, right=True).sum()
            low, high = (low, middle) if certain + int(below) >= place else (middle, high)
        return high


@dataclass(frozen=True)
class Extent:
    """The ends and the middle of a list of eigenvalues."""

    largest: float
    median: float
    smallest: float

    @classmethod
    def of(cls, spectrum: Spectrum) -> "Extent":
        return cls(spectrum.largest, spectrum.median, spectrum.smallest)

    @property
    def condition(self) -> float:
        """Largest over smallest. Of float32 factors nothing beyond about 10⁷ each is resolved."""
        return ratio(self.largest, self.smallest)

    @property
    def condition_to_median(self) -> float:
        """Largest over median, which rounding does not govern."""
        return ratio(self.largest, self.median)


@dataclass(frozen=True)
class Curve:
    """Some eigenvalues of a matrix, largest first, with their ranks from 1, and all their mean."""

    ranks: tuple[int, ...]
    values: tuple[float, ...]
    mean: float


@dataclass(frozen=True)
class LayerTotals:
    """What is known of a layer without any eigenvalue.

    ``shape`` is that of the weight [out, in] (``act`` does not know the outputs). ``trace`` is that
    of the layer's block of H: independent noise of variance ε² on each of its weights costs a KL of
    ½ε²·trace, in nats per token. It is tr A · tr G, τ-corrected for ``tkfac``, or the sum of the
    eigenvalues, and None for ``act``. ``bytes``: what the file holds for the layer; factors that
    several layers share count for the first.
    """

    name: str
    kind: Kind
    shape: tuple[int | None, int]
    inputs_trace: float | None
    outputs_trace: float | None
    trace: float | None
    bytes: int


@dataclass(frozen=True)
class LayerSpectrum(LayerTotals):
    """The eigenvalues of a layer's block of H, in short, as they are and as they are inverted.

    ``damping`` is λ, as :class:`~unlearn.curvature.direction.Direction` reports it. ``curves`` has
    ``A`` and ``G``, or ``H`` where H is known by its own eigenvalues. For ``act`` they are those of
    A, each of which H has once per output.
    """

    eigenvalues: Extent
    damped: Extent
    effective_rank: float
    damping: float
    curves: Mapping[str, Curve]

    @property
    def damping_to_median(self) -> float:
        """λ over the median eigenvalue: above 1, damping governs most directions of the layer.

        A mean-based λ is inflated where one direction holds most of the trace.
        """
        return ratio(self.damping, self.eigenvalues.median)


def totals(curvature: Curvature) -> list[LayerTotals]:
    """Give the traces and sizes of every layer; quick, for nothing is factorised."""
    return [LayerTotals(**_totals(name, one)) for name, one in curvature.layers.items()]


def spectra(
    curvature: Curvature,
    damping: Damping,
    *,
    device: torch.device | str | None = None,
    progress: Progress = lambda done, total: None,
) -> list[LayerSpectrum]:
    """Give the spectrum of every layer, and what this damping makes of it.

    Eigenvalues of A and G are worked out in float64, on ``device`` (default: where they are), and
    once for layers that share A. ``progress`` is told (layers done, layers in all).
    """
    layers, shared = curvature.layers, dict[str, Tensor]()
    found = []
    for name, one in layers.items():
        spectrum = _spectrum(one, shared, device)
        amount, damped = _damped(one, spectrum, damping)
        found.append(
            LayerSpectrum(
                **_totals(name, one),
                eigenvalues=Extent.of(spectrum),
                damped=Extent.of(damped),
                effective_rank=spectrum.effective_rank,
                damping=amount,
                curves=dict(_curves(one, spectrum)),
            )
        )
        progress(len(found), len(layers))
    return found


def ratio(value: float, to: float) -> float:
    """Divide; infinite over 0, NaN for 0 over 0."""
    return value / to if to > 0 else math.inf if value > 0 else math.nan


def kind_of(layer: LayerCurvature) -> Kind:
    """Tell the kind of curvature from what it holds."""
    if layer.eigenvalues is not None:
        return "diag" if layer.input_basis is None else "ekfac"
    if layer.outputs is None:
        return "act"
    return "kfac" if layer.trace is None else "tkfac"


def _totals(name: str, layer: LayerCurvature) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind_of(layer),
        "shape": _shape(layer),
        "inputs_trace": layer.inputs and layer.inputs.trace(),
        "outputs_trace": layer.outputs and layer.outputs.trace(),
        "trace": _trace(layer),
        "bytes": sum(one.nbytes for one in _tensors(layer, owns_inputs=name == layer.group)),
    }


def _shape(layer: LayerCurvature) -> tuple[int | None, int]:
    if layer.eigenvalues is not None:
        out, inputs = layer.eigenvalues.shape
        return out, inputs
    assert layer.inputs is not None
    return layer.outputs.size if layer.outputs else None, layer.inputs.size


def _trace(layer: LayerCurvature) -> float | None:
    if layer.eigenvalues is not None:
        return float(layer.eigenvalues.double().sum())
    if layer.inputs is None or layer.outputs is None:
        return None
    product = layer.inputs.trace() * layer.outputs.trace()
    return product if layer.trace is None else layer.trace


def _tensors(layer: LayerCurvature, *, owns_inputs: bool) -> Iterator[Tensor]:
    sides = [layer.outputs, layer.output_basis]
    sides += [layer.inputs, layer.input_basis] if owns_inputs else []
    for side in sides:
        yield from side.parts if side else ()
    if layer.eigenvalues is not None:
        yield layer.eigenvalues


def _spectrum(
    layer: LayerCurvature, shared: dict[str, Tensor], device: torch.device | str | None
) -> Spectrum:
    if layer.eigenvalues is not None:
        return Spectrum.of(layer.eigenvalues)
    assert layer.inputs is not None
    if layer.group not in shared:
        shared[layer.group] = _values(layer.inputs, device)
    if layer.outputs is None:
        return Spectrum.of(shared[layer.group])
    outputs = _values(layer.outputs, device)
    return Spectrum.of(shared[layer.group], outputs * _correction(layer))


def _values(factor: Blocks, device: torch.device | str | None) -> Values:
    """Give the eigenvalues of all blocks in float64, on the CPU whatever has solved for them."""

    def solved(part: Tensor) -> Tensor:
        double = part.to(device or part.device).double()
        try:
            return torch.linalg.eigvalsh(double).cpu()
        except LinAlgError:
            return torch.linalg.eigvalsh(double.cpu())

    return torch.cat([solved(part) for part in factor.parts])


def _correction(layer: LayerCurvature) -> float:
    """Give tr H / (tr A tr G), and 1 where there is nothing to correct."""
    factors = (layer.inputs, layer.outputs)
    return 1.0 if any(one and one.trace() <= 0 for one in factors) else trace_correction(layer)


def _damped(layer: LayerCurvature, spectrum: Spectrum, damping: Damping) -> tuple[float, Spectrum]:
    """Give λ and the eigenvalues that are inverted; as in :func:`unlearn.curvature.solve.inverse`.

    A layer without curvature is left alone, and so is its spectrum.
    """
    mean = spectrum.sum / len(spectrum)
    if not mean:
        return 0.0, spectrum
    amount = damping.amount(mean)
    if layer.outputs is None or damping.kind != "factored":
        return amount, Spectrum(spectrum.inputs, spectrum.outputs, amount)
    mean_in, mean_out = float(spectrum.inputs.mean()), float(spectrum.outputs.mean())
    to_inputs, to_outputs = factored(mean_in, mean_out, damping.c)
    return amount, Spectrum(spectrum.inputs + to_inputs, spectrum.outputs + to_outputs)


def _curves(layer: LayerCurvature, spectrum: Spectrum) -> Iterator[tuple[str, Curve]]:
    yield "A" if layer.inputs else "H", _curve(spectrum.inputs)
    if layer.outputs:
        yield "G", _curve(spectrum.outputs)


def _curve(ascending: Values) -> Curve:
    size = len(ascending)
    steps = {min(size, round(size ** (place / (POINTS - 1)))) for place in range(POINTS)}
    ranks = sorted(steps | {size + 1 - step for step in steps})
    values = ascending[[size - rank for rank in ranks]]
    return Curve(tuple(ranks), tuple(values.tolist()), float(ascending.mean()))
