"""Objectives over the states inside the model: one value per labelled token; 0 elsewhere."""

from functools import lru_cache

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from unlearn.activations import Activations


def rmu(
    policy: Activations,
    *,
    layer: NonNegativeInt = 7,
    steering: PositiveFloat = 20.0,
    control_seed: NonNegativeInt = 0,
) -> Float[Tensor, "batch seq"]:
    """Push what leaves a layer towards a fixed random vector: mean squared distance per token.

    The mean runs over the width. The vector is uniform in [0, 1) scaled to length ``steering``, a
    function of the width and ``control_seed`` alone. ``layer`` 0 is the first layer.
    Source: Li et al. 2024, WMDP, arXiv:2403.03218, section 5 (RMU). Deviations: prompt and padding
    do not count (the published script averages over all positions), and tokens of the whole step
    weigh the same (open-unlearning averages within each row first). One vector serves all topics.
    """
    control = _control(policy.hidden.shape[-1], control_seed).to(policy.hidden) * steering
    return (policy.hidden - control).square().mean(-1) * policy.mask


def adaptive_rmu(
    policy: Activations,
    *,
    layer: NonNegativeInt = 7,
    scale: PositiveFloat = 5.0,
    control_seed: NonNegativeInt = 0,
    token_norm: PositiveFloat | None = None,
) -> Float[Tensor, "batch seq"]:
    """Push what leaves a layer towards a random vector whose length suits the layer: per token.

    As :func:`rmu`, with the vector scaled to length ``scale * token_norm``. ``token_norm`` is the
    mean length of what leaves the layer at labelled forget tokens of the frozen start; a run
    measures it once (:func:`unlearn.reference.mean_token_norm`) unless it is given.
    Source: Huu-Tien et al. 2024, "On Effects of Steering Latent Representation for LLM Unlearning",
    arXiv:2408.06223 (Adaptive RMU). Deviations: those of :func:`rmu`, and the length is
    measured on labelled tokens of a fixed number of rows, not on one batch with its padding.
    """
    assert token_norm is not None
    return rmu(policy, layer=layer, steering=scale * token_norm, control_seed=control_seed)


def embed_diff(
    policy: Activations, reference: Activations, *, layer: NonNegativeInt = 7
) -> Float[Tensor, "batch seq"]:
    """Keep what leaves a layer where the frozen start had it: mean squared distance per token.

    The retain term of RMU (Li et al. 2024, arXiv:2403.03218); labelled tokens only, as in
    open-unlearning's EMBED_DIFF.
    """
    return (policy.hidden - reference.hidden).square().mean(-1) * policy.mask


@lru_cache
def _control(width: int, seed: int) -> Float[Tensor, " width"]:
    """Draw the direction: uniform, positive, of length 1; the same on every device."""
    vector = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()
