"""Random dictionaries of every kind, in float64, and what each must give by its formula."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearn.sae.dictionary import Dictionary

WIDTH, LATENTS, K = 5, 11, 3


def make_dictionary(kind: Any, *, seed: int = 0, centred: bool = True) -> Dictionary:
    """Draw weights large enough for every branch to be taken."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found: dict[str, Any] = {
        "w_enc": draw(WIDTH, LATENTS), "b_enc": draw(LATENTS) / 2,
        "w_dec": draw(LATENTS, WIDTH), "b_dec": draw(WIDTH),
    }  # fmt: skip
    if kind == "gated":
        found |= {"r_mag": draw(LATENTS) / 2, "b_mag": draw(LATENTS)}
    elif kind not in ("relu", "topk"):
        found["threshold"] = draw(LATENTS).abs()
    return Dictionary(kind, **found, k=K if kind == "topk" else None, centred=centred)


def naive_encode(d: Dictionary, x: Tensor) -> list[list[float]]:
    """Go through every token and latent with plain Python numbers."""
    w, found = d.w_enc.tolist(), []
    for token in x.tolist():
        inside = [v - b * d.centred for v, b in zip(token, d.b_dec.tolist(), strict=True)]
        sums = [sum(v * w[i][f] for i, v in enumerate(inside)) for f in range(d.latents)]
        pre = [s + b for s, b in zip(sums, d.b_enc.tolist(), strict=True)]
        found.append(_active(d, sums, pre))
    return found


def _active(d: Dictionary, sums: list[float], pre: list[float]) -> list[float]:
    if d.kind == "relu":
        return [max(0.0, p) for p in pre]
    if d.kind == "topk":
        best = sorted(range(d.latents), key=lambda f: -pre[f])[: d.k]
        return [max(0.0, p) if f in best else 0.0 for f, p in enumerate(pre)]
    if d.kind == "gated":
        assert d.r_mag is not None
        assert d.b_mag is not None
        both = zip(sums, pre, d.r_mag.tolist(), d.b_mag.tolist(), strict=True)
        return [max(0.0, s * math.exp(r) + b) * (p > 0) for s, p, r, b in both]
    assert d.threshold is not None
    return [max(0.0, p) * (p > t) for p, t in zip(pre, d.threshold.tolist(), strict=True)]


@pytest.fixture
def build() -> Callable[..., Dictionary]:
    return make_dictionary


@pytest.fixture
def naive() -> Callable[[Dictionary, Tensor], list[list[float]]]:
    return naive_encode
