"""Fitting curvature to rows in one streaming pass (two where eigenvalues are measured)."""

import hashlib
import json
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from unlearn.curvature import sharing
from unlearn.curvature.distance import Reference
from unlearn.curvature.factors import (
    Counts,
    FactorSums,
    Kind,
    LayerCurvature,
    SpectrumSums,
    accumulated,
    counted,
)
from unlearn.curvature.labels import Ascend, Fisher, LabelSource, toward
from unlearn.curvature.layers import Tracked
from unlearn.curvature.passes import (
    Batch,
    Cotangents,
    Rows,
    backward_passes,
    batches,
    forward_passes,
)
from unlearn.curvature.solve import eigenvectors
from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.head import VocabularyHead
from unlearn.ranks import Ranks, whole
from unlearn.scores import Scorer

ENOUGH = 2
"""Loss tokens per dimension of the widest factor, below which there is a warning; 8 are wanted."""


@dataclass(frozen=True)
class FitSettings:
    """How curvature is estimated; see :data:`~unlearn.curvature.factors.Kind`.

    ``fisher``: labels drawn from the model, by ``importance`` or plainly (``mc``: the same
    matrix, less well known from the same draws), or those of the rows (``empirical``, another
    matrix). ``label_draws``: sets of labels drawn per row; more are worth it where rows are few.
    ``max_factor_dim``: wider axes are cut into blocks.
    """

    curvature: Kind = "kfac"
    fisher: Fisher = "importance"
    label_draws: int = 1
    max_factor_dim: int = 16384
    seed: int = 0

    def labels(self, stream: int) -> LabelSource:
        """Give the labels of a pass; passes draw apart, or the second would be biased."""
        return LabelSource(self.fisher, self.label_draws, self.seed, stream)


@dataclass(frozen=True)
class Curvature:
    """The curvature of all tracked layers, and what it was estimated from."""

    layers: Mapping[str, LayerCurvature]
    counts: Counts
    identity: Mapping[str, Any]


def fit_curvature(
    model: Any,
    rows: Rows,
    layers: Sequence[Tracked],
    settings: FitSettings | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    scorer: Scorer | None = None,
) -> Curvature:
    """Estimate the curvature of KL(model || changed model) on these rows, layer by layer.

    Every process of a launch must call this with the same rows; they share them and are all given
    the sums. Factorisations are worked out by one process each.

    Raises:
        UserError: no row has a labelled token, or a sum is not finite.
    """
    settings = settings or FitSettings()
    scorer = scorer or Scorer.for_model(whole(model))
    if settings.curvature == "diag":
        found = {layer.name: LayerCurvature(layer.group) for layer in layers}
        found, counts = with_spectrum(found, model, rows, layers, settings, scorer=scorer)
    else:
        found, counts = fit_factors(model, rows, layers, settings, scorer=scorer)
    _require_finite(found)
    if settings.curvature == "ekfac":
        found = with_bases(found, Ranks.of(whole(model)))
        found, _ = with_spectrum(found, model, rows, layers, settings, scorer=scorer)
        _require_finite(found)
    return Curvature(found, counts, dict(identity or {}))


def fit_factors(
    model: Any,
    rows: Rows,
    layers: Sequence[Tracked],
    settings: FitSettings,
    *,
    scorer: Scorer | None = None,
) -> tuple[dict[str, LayerCurvature], Counts]:
    """Go through the rows once: A, G (not for ``act``) and the trace (``tkfac``) of every layer."""
    model = whole(model)
    scorer = scorer or Scorer.for_model(model)
    sums = FactorSums.for_layers(layers, settings.curvature, settings.max_factor_dim)
    stream, source = counted(batches(model, rows), sums), settings.labels(0)
    if settings.curvature == "act":
        forward_passes(model, layers, stream, sums.hear_inputs, scorer=scorer)
    else:
        backward_passes(model, layers, stream, source, sums.hear, scorer=scorer)
    sums = sums.over_ranks(Ranks.of(model))
    counts = _checked(sums.counts, layers)
    return sums.layers(layers, source.number), counts


def with_bases(
    layers: MutableMapping[str, LayerCurvature], ranks: Ranks | None = None
) -> dict[str, LayerCurvature]:
    """Give every layer the eigenvectors of its factors in place of them.

    ``layers`` is emptied, so that all factors and all eigenvectors are never held at once.
    """
    ranks = ranks or Ranks()
    inputs = {one.group: one.inputs for one in layers.values() if one.inputs}
    outputs = {name: one.outputs for name, one in layers.items() if one.outputs}
    about = {name: replace(one, inputs=None, outputs=None) for name, one in layers.items()}
    layers.clear()
    right = sharing.bases(inputs, eigenvectors, ranks)
    left = sharing.bases(outputs, eigenvectors, ranks)
    return {
        name: replace(one, input_basis=right[one.group], output_basis=left[name])
        for name, one in about.items()
    }


def with_spectrum(
    found: Mapping[str, LayerCurvature],
    model: Any,
    rows: Rows,
    layers: Sequence[Tracked],
    settings: FitSettings,
    *,
    scorer: Scorer | None = None,
) -> tuple[dict[str, LayerCurvature], Counts]:
    """Measure eigenvalues in a pass of its own, with labels of its own."""
    model = whole(model)
    sums, source = SpectrumSums.for_layers(layers, found), settings.labels(1)
    stream = counted(batches(model, rows), sums)
    scorer = scorer or Scorer.for_model(model)
    backward_passes(model, layers, stream, source, sums.hear, scorer=scorer)
    sums = sums.over_ranks(Ranks.of(model))
    counts = _checked(sums.counts, layers)
    labels = counts.labels * source.number
    return {
        name: replace(found[name], eigenvalues=total.div_(labels))
        for name, total in sums.totals.items()
    }, counts


def _checked(counts: Counts, layers: Sequence[Tracked]) -> Counts:
    if not counts.labels:
        raise UserError("the rows have no labelled token, so there is no curvature", "give others")
    if doubt := too_few(counts.labels, max(max(layer.shape) for layer in layers)):
        warnings.warn(doubt, stacklevel=3)
    return counts


def too_few(labels: int, widest: int) -> str | None:
    """Say that this many loss tokens tell little of factors of this width; None when enough."""
    if labels >= ENOUGH * widest:
        return None
    return (
        f"{labels} loss tokens for factors of up to {widest} dimensions: curvature is poorly known "
        f"below {ENOUGH * widest}, and {8 * widest} are wanted; give more retain rows, or more "
        "label_draws"
    )


def _require_finite(layers: Mapping[str, LayerCurvature]) -> None:
    for name, layer in layers.items():
        blocks = [one for one in (layer.inputs, layer.outputs) if one is not None]
        tensors = [part for one in blocks for part in one.parts]
        tensors += [layer.eigenvalues] if layer.eigenvalues is not None else []
        if not all(bool(one.isfinite().all()) for one in tensors):
            raise UserError(
                f"the curvature of '{name}' is not finite: activations or gradients overflow",
                "load the model as bfloat16 or float32",
            )


@dataclass(frozen=True)
class Gradient:
    """The gradient of the mean of −log p, or log(1 − p), over labelled tokens: nats per token."""

    weights: Mapping[str, Float[Tensor, "out in"]]
    num_labels: int


def gradient(
    model: Any,
    rows: Rows,
    layers: Sequence[Tracked],
    *,
    ascend: Ascend = "nll",
    scorer: Scorer | None = None,
) -> Gradient:
    """Give the gradient of what is raised on the rows for every tracked weight, summed in fp32.

    (In bf16, small contributions of later batches would be lost.)
    """
    return _summed(model, rows, layers, LabelSource("empirical", ascend=ascend), scorer)


def kl_gradient(
    model: Any, reference: Reference, layers: Sequence[Tracked], *, progress: Rows | None = None
) -> Gradient:
    """Give the gradient of KL(then || now) on the rows of a reference, per labelled token."""
    then = iter(reference.states)

    def source(head: VocabularyHead, states: Tensor) -> Tensor:
        return toward(head, states, next(then))

    rows = progress or reference.rows
    return _summed(model, rows, layers, source, reference.scorer)


def _summed(
    model: Any,
    rows: Rows,
    layers: Sequence[Tracked],
    source: LabelSource | Cotangents,
    scorer: Scorer | None,
) -> Gradient:
    model = whole(model)
    ranks, scorer = Ranks.of(model), scorer or Scorer.for_model(model)
    sums = SpectrumSums.for_layers(layers, {})

    def hear(layer: Tracked, batch: Batch, draw: int, inputs: Tensor, grads: Tensor) -> None:
        dtype = accumulated(inputs.dtype)
        sums.totals[layer.name].addmm_(grads.to(dtype).t(), inputs.to(dtype))

    stream = counted(batches(model, rows), sums)
    backward_passes(model, layers, stream, source, hear, scorer=scorer)
    sums = sums.over_ranks(ranks)
    labels = sums.counts.labels
    if not labels:
        raise UserError("the rows have no labelled token, so there is no gradient", "give others")
    return Gradient({name: total.div_(labels) for name, total in sums.totals.items()}, labels)


def identity_of(
    weights_hash: str, examples: Sequence[Example], layers: Sequence[Tracked], how: FitSettings
) -> dict[str, Any]:
    """Name all that curvature depends on: model, rows, layers and settings."""
    rows = json.dumps([[one.input_ids, one.labels] for one in examples])
    return {
        "model": weights_hash,
        "rows": hashlib.sha256(rows.encode()).hexdigest(),
        "layers": [layer.name for layer in layers],
        **asdict(how),
    }
