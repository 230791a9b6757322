"""How much each row counts, by its loss: weights without gradient, pure functions.

Source: Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model
Pretraining", arXiv:2502.06733, and its published code, whose faults are named where they are left
out. A row's loss is the mean over its labelled tokens, in nats.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Strategy = Literal["uniform", "linupper", "upper", "quadratic", "extremes"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FLAT = 1e-3
"""Losses whose range is below this share of their mean count as equal: the rest is rounding."""

Rows = Float[Tensor, " row"]
Valid = Bool[Tensor, " row"]


def standing(losses: Rows, valid: Valid, *, trim: float = 0.0) -> Rows:
    """Say where each valid loss stands between the lowest (-1) and the highest (1) of them.

    ``trim`` takes quantiles in place of both ends, that share of the rows away from them; what lies
    beyond them stands at -1 or 1, so one bad row does not press all others together.
    """
    low, high = _ends(losses, valid)
    if trim:
        ends = torch.tensor([trim, 1.0 - trim], dtype=losses.dtype, device=losses.device)
        low, high = losses.masked_fill(~valid, torch.nan).nanquantile(ends)
    return place_between(losses, low, high)


def _ends(losses: Rows, valid: Valid) -> tuple[Tensor, Tensor]:
    low = losses.masked_fill(~valid, torch.inf).min()
    return low, losses.masked_fill(~valid, -torch.inf).max()


def place_between(losses: Rows, low: Tensor, high: Tensor) -> Rows:
    """Map [low, high] to [-1, 1]; values beyond are brought to the ends."""
    span = (high - low).clamp_min(torch.finfo(losses.dtype).tiny)
    return ((2.0 * losses - low - high) / span).clamp(-1.0, 1.0)


def score(places: Rows, strategy: Strategy) -> Rows:
    """Give the value in [0, 1] whose exponential a row is weighted by.

    ``linupper``: rises to the middle of the range and is flat above, so easy rows count less and
    hard ones are capped. ``upper``: rises all the way. ``quadratic``: the middle of the range.
    ``extremes``: both ends. ``uniform``: all alike (the published README's ``uniform`` is not).
    """
    if strategy == "linupper":
        return (places + 1.0).clamp_max(1.0)
    if strategy == "upper":
        return 0.5 * places + 0.5
    if strategy == "quadratic":
        return 1.0 - places.square()
    if strategy == "extremes":
        return places.abs()
    return torch.ones_like(places)


def is_flat(losses: Rows, valid: Valid) -> Bool[Tensor, ""]:
    """Tell losses that are equal but for rounding; their order would mean nothing."""
    low, high = _ends(losses, valid)
    mean = losses.masked_fill(~valid, 0.0).abs().sum() / valid.sum()
    return high - low < FLAT * mean


@torch.no_grad()
def sample_weights(
    losses: Rows,
    valid: Valid | None = None,
    *,
    strategy: Strategy = "linupper",
    max_weight_ratio: float = 10.0,
    trim: float = 0.0,
) -> Rows:
    """Give weights that sum to 1 over the valid rows, and are 0 elsewhere.

    ``exp(f * ln(max_weight_ratio))``, normalised, with f in [0, 1] from :func:`score`: no row
    counts more than ``max_weight_ratio`` times another one. (The paper's temperature r is
    1 / ln(max_weight_ratio).) Rows of equal loss get equal weights.
    """
    valid = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid
    values = score(standing(losses, valid, trim=trim), strategy)
    values = torch.where(is_flat(losses, valid), torch.ones_like(values), values)
    weights = (values * math.log(max_weight_ratio)).masked_fill(~valid, -torch.inf).softmax(0)
    return weights.masked_fill(~valid, 0.0)


def factors(weights: Rows, units: Rows) -> Rows:
    """Turn weights into factors whose mean over the units of all rows is 1.

    ``units`` counts what a row's loss is a sum over: its labelled tokens, or 1 for one value per
    row. So equal weights are the factor 1, and leave an average over units as it was.
    """
    total = (weights * units).sum()
    return weights * units.sum() / torch.where(total > 0, total, torch.ones_like(total))


def effective_share(weights: Rows, valid: Valid) -> Float[Tensor, ""]:
    """Give the effective number of rows, (sum w)^2 / sum w^2, as a share of the valid rows."""
    squares = weights.square().sum().clamp_min(1e-30)
    return weights.sum().square() / squares / valid.sum().clamp_min(1)
