"""How often each latent should fire: Zipf's law, for Feature Choice and ``aux_zipf``.

Ayonrinde 2024, arXiv:2411.02124 sees sparsity as a budget of M = k·B pairs (token, latent): TopK
allows k per token, Feature Choice m_i per latent, Mutual Choice only the total. Its equations were
not at hand: what follows is our formulation, inspired by it. Frequencies of latents, ranked, follow
``q_r ∝ (r + beta)^-alpha``, r = 0, 1, …
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BETAS = tuple(np.geomspace(0.25, 4096, 57).tolist())
"""Offsets that are tried."""
KEPT = 0.8
"""Share of the ranks, in the middle, that the law is fitted to."""


@dataclass(frozen=True)
class Zipf:
    """The law's exponent and offset."""

    alpha: float
    beta: float

    @classmethod
    def fit(cls, frequency: Float[Tensor, " latent"]) -> "Zipf":
        """Fit the law by least squares of log frequency over the middle 80 % of the ranks.

        Latents that never fired have no logarithm and stay out, as dead ones should. A law that
        would rise is flat.
        """
        found = np.sort(frequency.double().cpu().numpy())[::-1]
        found = found[found > 0]
        cut = int(len(found) * (1 - KEPT) / 2)
        ranks = np.arange(len(found))[cut : len(found) - cut]
        logs = np.log(found[cut : len(found) - cut])
        if len(ranks) < 3:
            return cls(0.0, 1.0)
        fits = [(*_line(np.log(ranks + beta), logs), beta) for beta in BETAS]
        _, slope, beta = min(fits)
        return cls(max(0.0, -slope), beta)

    def shares(self, number: int) -> Float[Tensor, " rank"]:
        """Give every rank's share of all firings; they sum to 1."""
        ranks = torch.arange(number, dtype=torch.float64)
        return (-self.alpha * (ranks + self.beta).log()).softmax(
            0
        )  # a steep law underflows nowhere

    def of_latents(self, frequency: Float[Tensor, " latent"]) -> Float[Tensor, " latent"]:
        """Give every latent the share of its rank by frequency; ties in their order."""
        order = frequency.cpu().sort(descending=True, stable=True).indices
        found = torch.empty(len(order), dtype=torch.float64)
        found[order] = self.shares(len(order))
        return found.to(frequency.device)


def budgets(shares: Float[Tensor, " latent"], total: int) -> Int[Tensor, " latent"]:
    """Give how many tokens of a batch each latent may have: ``max(1, round(M q))``."""
    return (shares * total).round().clamp_min(1).long()


def need(
    frequency: Float[Tensor, " latent"], expected: Float[Tensor, " latent"]
) -> Float[Tensor, " latent"]:
    """Give ``clip(1 - n/n*, 0, 1)``: 1 for a latent that never fires, 0 where it is enough."""
    tiny = torch.finfo(expected.dtype).tiny
    return (1 - frequency / expected.clamp(min=tiny)).clamp(0, 1)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Give the squared error and the slope of the best straight line."""
    centred, across = x - x.mean(), y - y.mean()
    slope = float(centred @ across / (centred @ centred))
    rest = across - slope * centred
    return float(rest @ rest), slope
