"""The direction of a Gauss–Newton step, and what it is predicted to change."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn.curvature.damping import Damping
from unlearn.curvature.factors import LayerCurvature
from unlearn.curvature.fit import Curvature, Gradient
from unlearn.curvature.sharing import cube, owners
from unlearn.curvature.solve import inverse
from unlearn.ranks import Ranks


@dataclass(frozen=True)
class Direction:
    """d = (H + λI)⁻¹g, where g is the gradient of the forget loss and H the curvature.

    A step δ = αd maximises gᵀδ − (1/2α) δᵀ(H + λI)δ: 1/α is the price of a nat of KL, per retain
    token, in nats of forget loss per token. ``slope`` is gᵀd, ``bend`` is dᵀHd without damping
    (None where the curvature knows inputs only), ``dampings`` is λ of every layer that moves.
    """

    weights: Mapping[str, Float[Tensor, "out in"]]
    slope: float
    bend: float | None
    dampings: Mapping[str, float]

    def gain(self, alpha: float) -> float:
        """Predicted rise of the forget loss, nats per token, to first order."""
        return alpha * self.slope

    def kl(self, alpha: float) -> float | None:
        """Predicted KL on the retain rows, nats per token, to second order."""
        return None if self.bend is None else 0.5 * alpha**2 * self.bend

    def damped_kl(self, alpha: float) -> float:
        """½ δᵀ(H + λI)δ, which is (α/2) gᵀδ: what the step itself was charged."""
        return 0.5 * alpha * self.gain(alpha)

    def trust_region(self, kl: float) -> float:
        """Give the α whose predicted KL is this many nats per token."""
        if not self.bend:
            raise ValueError("no KL can be predicted")
        return math.sqrt(2 * kl / self.bend)


@torch.no_grad()
def direction(
    curvature: Curvature, grad: Gradient, damping: Damping, *, ranks: Ranks | None = None
) -> Direction:
    """Precondition the gradient of every layer; each layer by one process, for all."""
    ranks = ranks or Ranks()
    layers = curvature.layers
    dealt = owners({name: _cost(grad.weights[name].shape) for name in layers}, ranks.size)
    weights, figures = {}, torch.zeros(len(layers), 3, dtype=torch.float64)
    for place, (name, layer) in enumerate(layers.items()):
        g = grad.weights[name]
        found = torch.empty_like(g)
        if dealt[name] == ranks.rank:
            found, figures[place] = _precondition(layer, g, damping)
        weights[name] = ranks.from_rank(found, dealt[name])
    figures = ranks.add(figures)
    sums = figures.sum(0).tolist()
    predicts = all(layer.outputs or layer.eigenvalues is not None for layer in layers.values())
    amounts = zip(layers, figures[:, 2].tolist(), strict=True)
    dampings = {name: amount for name, amount in amounts if amount}
    return Direction(weights, sums[0], sums[1] if predicts else None, dampings)


def _cost(shape: Sequence[int]) -> float:
    return cube(list(shape))


def _precondition(
    layer: LayerCurvature, g: Float[Tensor, "out in"], damping: Damping
) -> tuple[Tensor, Tensor]:
    """Give the layer's part of the direction, and (gᵀd, dᵀHd, λ).

    Without a gradient there is no step, whatever the curvature: A of an adapter has neither as long
    as B is 0.
    """
    if not g.any():
        return torch.zeros_like(g), torch.zeros(3, dtype=torch.float64)
    operator = inverse(layer, damping)
    found = operator.solve(g)
    slope = float((g.double() * found.double()).sum())
    bend = operator.bend(found)
    return found, torch.tensor([slope, bend, operator.damping], dtype=torch.float64)
