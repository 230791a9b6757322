"""What is known of the curvature of each layer, and the sums it is made from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.layers import Tracked
from unlearn.curvature.passes import Batch
from unlearn.ranks import Ranks

Kind = Literal["kfac", "ekfac", "tkfac", "act", "diag"]
"""``kfac``: H ≈ G ⊗ A. ``ekfac``: the eigenvalues of G ⊗ A replaced by H's own diagonal in that
basis. ``tkfac``: G ⊗ A scaled to H's own trace. ``act``: A alone, G the identity. ``diag``: the
diagonal of H."""


@dataclass(frozen=True)
class Counts:
    """How much was seen: loss tokens N, positions that took part P, and rows."""

    labels: int = 0
    tokens: int = 0
    rows: int = 0

    def with_batch(self, batch: Batch) -> "Counts":
        tokens, rows = len(batch.token_places), len(batch.rows)
        return Counts(self.labels + batch.num_labels, self.tokens + tokens, self.rows + rows)

    def over_ranks(self, ranks: Ranks) -> "Counts":
        return Counts(*ranks.add(torch.tensor([self.labels, self.tokens, self.rows])).tolist())


@dataclass(frozen=True)
class LayerCurvature:
    """The block of H that belongs to one weight [out, in], per loss token.

    ``inputs`` is A = (1/P) Σ a aᵀ over the positions that take part, ``outputs`` is
    G = (1/N) Σ g gᵀ, where g is the gradient of the summed loss of all later tokens.
    ``eigenvalues`` [out, in] is (1/N) Σ_rows (Q_Gᵀ u Q_A)², u the gradient of a whole row: in the
    basis of G ⊗ A (``ekfac``) or in the weights' own (``diag``, no bases). ``trace`` is the trace
    of the block itself, (1/N) Σ_rows ‖u‖².
    """

    group: str
    inputs: Blocks | None = None
    outputs: Blocks | None = None
    input_basis: Blocks | None = None
    output_basis: Blocks | None = None
    eigenvalues: Float[Tensor, "out in"] | None = None
    trace: float | None = None


@dataclass
class FactorSums:
    """Sums behind A, G and the traces of one pass."""

    inputs: dict[str, Blocks]
    outputs: dict[str, Blocks]
    traces: dict[str, Tensor] | None = None
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def for_layers(cls, layers: Sequence[Tracked], kind: Kind, limit: int) -> "FactorSums":
        """Make room for the factors that a kind of curvature has; inputs once per group."""

        def room(layer: Tracked, axis: int) -> Blocks:
            weight = layer.weight
            dtype = accumulated(weight.dtype)
            return Blocks.zeros(weight.shape[axis], limit, dtype=dtype, device=weight.device)

        inputs = {layer.group: room(layer, 1) for layer in layers if layer.name == layer.group}
        both = {} if kind == "act" else {layer.name: room(layer, 0) for layer in layers}
        zeros = {layer.name: torch.zeros((), dtype=torch.float64) for layer in layers}
        return cls(inputs, both, zeros if kind == "tkfac" else None)

    def hear(self, layer: Tracked, batch: Batch, draw: int, inputs: Tensor, grads: Tensor) -> None:
        """Take one layer's share of a backward pass; inputs count once, not once per draw."""
        if draw == 0 and layer.name == layer.group:
            self.inputs[layer.group].add_rows(inputs)
        self.outputs[layer.name].add_rows(grads)
        if self.traces is not None:
            self.traces[layer.name] += row_norms(batch, inputs, grads)

    def hear_inputs(self, layer: Tracked, batch: Batch, inputs: Tensor) -> None:
        """Take one layer's share of a forward pass."""
        if layer.name == layer.group:
            self.inputs[layer.group].add_rows(inputs)

    def over_ranks(self, ranks: Ranks) -> "FactorSums":
        """Give the sums over all processes."""
        traces = self.traces and {name: ranks.add(one) for name, one in self.traces.items()}
        return replace(
            self,
            inputs={name: one.mapped(ranks.add) for name, one in self.inputs.items()},
            outputs={name: one.mapped(ranks.add) for name, one in self.outputs.items()},
            traces=traces,
            counts=self.counts.over_ranks(ranks),
        )

    def layers(self, layers: Iterable[Tracked], draws: int) -> dict[str, LayerCurvature]:
        """Give the factors per loss token; with several draws, G is their mean."""
        counts, labels = self.counts, self.counts.labels * draws
        inputs = {name: one.finished(counts.tokens) for name, one in self.inputs.items()}
        found = {}
        for layer in layers:
            outputs = self.outputs.get(layer.name)
            trace = None if self.traces is None else float(self.traces[layer.name]) / labels
            finished = outputs and outputs.finished(labels)
            found[layer.name] = LayerCurvature(
                layer.group, inputs[layer.group], finished, trace=trace
            )
        return found


@dataclass
class SpectrumSums:
    """Sums behind the eigenvalues: per row the gradient in the layer's basis, squared."""

    bases: Mapping[str, LayerCurvature]
    totals: dict[str, Float[Tensor, "out in"]]
    counts: Counts = field(default_factory=Counts)
    turned: tuple[Batch, str, Tensor] | None = None
    """Inputs of the group heard last, in its basis."""

    @classmethod
    def for_layers(
        cls, layers: Sequence[Tracked], bases: Mapping[str, LayerCurvature]
    ) -> "SpectrumSums":
        totals = {
            layer.name: torch.zeros(
                layer.shape, dtype=accumulated(layer.weight.dtype), device=layer.weight.device
            )
            for layer in layers
        }
        return cls(bases, totals)

    def hear(self, layer: Tracked, batch: Batch, draw: int, inputs: Tensor, grads: Tensor) -> None:
        """Take one layer's share of a backward pass."""
        total, basis = self.totals[layer.name], self.bases[layer.name]
        grads, inputs = grads.to(total.dtype), inputs.to(total.dtype)
        if _rotates_tokens(basis, grads, inputs, len(batch.rows)):
            grads, inputs = _after(basis.output_basis, grads), self._turned(layer, batch, inputs)
            basis = LayerCurvature(layer.group)
        parts = (part.split(batch.tokens_per_row) for part in (grads, inputs))
        for g, a in zip(*parts, strict=True):
            total += rotated_sum(g, a, basis).square_()

    def _turned(self, layer: Tracked, batch: Batch, inputs: Tensor) -> Tensor:
        """Rotate inputs, once for layers that read the same: they are heard one after another."""
        kept = self.turned
        if kept is None or kept[0] is not batch or kept[1] != layer.group:
            found = _after(self.bases[layer.name].input_basis, inputs)
            self.turned = kept = (batch, layer.group, found)
        return kept[2]

    def over_ranks(self, ranks: Ranks) -> "SpectrumSums":
        """Give the sums over all processes."""
        totals = {name: ranks.add(one) for name, one in self.totals.items()}
        return replace(self, totals=totals, counts=self.counts.over_ranks(ranks))


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Give the precision of sums: fp32, or fp64 for fp64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rotates_tokens(basis: LayerCurvature, grads: Tensor, inputs: Tensor, rows: int) -> bool:
    """Tell whether rotating all tokens takes fewer products than rotating one sum per row."""
    if basis.input_basis is None or basis.output_basis is None:
        return False
    out, size, tokens = grads.shape[1], inputs.shape[1], len(inputs)
    return tokens * (out**2 + size**2) < rows * out * size * (out + size)


def rotated_sum(
    grads: Float[Tensor, "token out"], inputs: Float[Tensor, "token in"], basis: LayerCurvature
) -> Float[Tensor, "out in"]:
    """Give Q_Gᵀ (Σ_t g aᵀ) Q_A."""
    turned = _after(basis.input_basis, grads.t() @ inputs)
    return _after(basis.output_basis, turned.t()).t()


def _after(basis: Blocks | None, rows: Tensor) -> Tensor:
    return rows if basis is None else basis.after(rows)


def row_norms(batch: Batch, inputs: Tensor, grads: Tensor) -> Tensor:
    """Give Σ_rows ‖Σ_t g_t a_tᵀ‖² without forming a gradient.

    ‖Σ_t g_t a_tᵀ‖² = Σ_tt' (a_t·a_t')(g_t·g_t').
    """
    dtype = accumulated(inputs.dtype)
    total = torch.zeros((), dtype=torch.float64)
    parts = (part.to(dtype).split(batch.tokens_per_row) for part in (grads, inputs))
    for g, a in zip(*parts, strict=True):
        total += ((a @ a.t()) * (g @ g.t())).double().sum().cpu()
    return total


def counted(stream: Any, sums: FactorSums | SpectrumSums) -> Any:
    """Pass batches on, counting what goes by."""
    for batch in stream:
        sums.counts = sums.counts.with_batch(batch)
        yield batch
