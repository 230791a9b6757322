"""What a dictionary is trained to make small: pure functions, one value per token, never averaged.

All are in the unit of the squared error, summed over the width: the trainer adds them with their
weights and divides by the tokens of the whole step.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unlearn.sae.activation import step

Activation = Float[Tensor, "token width"]
Latents = Float[Tensor, "token latent"]
PerToken = Float[Tensor, " token"]
PerLatent = Float[Tensor, " latent"]


def squared_error(x: Activation, reconstruction: Activation) -> PerToken:
    """Give ``||x - x̂||²``: a sum over the width, not a mean."""
    return (x - reconstruction).square().sum(-1)


def l1(latents: Latents, norms: PerLatent) -> PerToken:
    """Give ``sum_f a_f ||W_dec[f]||``: with the norms, scaling a direction up gains nothing."""
    return latents @ norms


def l0(pre: Latents, threshold: PerLatent, bandwidth: float) -> PerToken:
    """Give the number of latents above their threshold; its gradient is that of ``step``.

    Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    return step(pre, threshold, bandwidth).sum(-1)


def tanh_l0(latents: Latents, norms: PerLatent, scale: float = 4.0) -> PerToken:
    """Give ``sum_f tanh(c a_f ||W_dec[f]||)``, a smooth number of active latents (SAELens)."""
    return torch.tanh(scale * latents * norms).sum(-1)


def pre_activation(
    pre: Latents, threshold: PerLatent, norms: PerLatent, dead: Bool[Tensor, " latent"]
) -> PerToken:
    """Give ``sum over dead f of relu(theta_f - pre_f) ||W_dec[f]||``: pulls dead latents up."""
    return (threshold - pre).relu() @ (norms * dead)


def gate_error(
    x: Activation,
    pi: Latents,
    w_dec: Float[Tensor, "latent width"],
    b_dec: Float[Tensor, " width"],
) -> PerToken:
    """Give ``||x - (relu(pi) W_dec + b_dec)||²``: the gate alone must reconstruct, too.

    Rajamanoharan et al. 2024, arXiv:2404.16014, which uses a frozen copy of the decoder (recalled,
    not looked up for this): only the gate learns from it. SAELens lets the decoder learn, too.
    """
    return squared_error(x, pi.relu() @ w_dec.detach() + b_dec.detach())


def aux_k(
    error: Activation,
    pre: Latents,
    w_dec: Float[Tensor, "latent width"],
    dead: Bool[Tensor, " latent"],
    k_aux: int,
) -> PerToken:
    """Let the ``k_aux`` largest dead latents of each token explain what the others left over.

    ``min(dead/k_aux, 1) ||ê - e||²``, e = x - x̂ without gradient, ê = a_aux W_dec (no bias): Gao et
    al. 2024, arXiv:2406.04093. Deviation: not divided by the variance of e (as
    dictionary_learning does) or of x (sparsify), so its weight is a share of the squared error.
    Of the largest, only the positive count, as in both (SAELens lets negative ones count too).
    """
    return aux_zipf(error, pre, w_dec, dead.to(pre.dtype), k_aux)


def aux_zipf(
    error: Activation,
    pre: Latents,
    w_dec: Float[Tensor, "latent width"],
    need: PerLatent,
    k_aux: int,
) -> PerToken:
    """Give :func:`aux_k` for latents that fire too rarely: ``need`` is 0 (enough) to 1 (never).

    The ``k_aux`` largest ``need_i * pre_i`` of each token make ê = sum need_i relu(pre_i) W_dec[i].
    Inspired by Ayonrinde 2024, arXiv:2411.02124, whose equations were not at hand: this is our own
    formula. Where every need is 0 or 1 it is AuxK.
    """
    weighted = pre.relu() * need
    values, places = weighted.topk(min(k_aux, weighted.shape[-1]), dim=-1)
    sparse = torch.zeros_like(weighted).scatter(-1, places, values)
    share = (need.sum() / k_aux).clamp(max=1.0)
    return share * squared_error(error.detach(), sparse @ w_dec)
