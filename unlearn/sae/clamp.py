"""Chosen latents set to another value where they are active: the change of the residual stream.

Farrell et al. 2024, arXiv:2410.19278, encode an activation, overwrite the latents S that are active
by -c, decode, and add back what the dictionary could not express: ``h' = dec(a') + (h - dec(a))``.
As that rest is kept, only the chosen latents matter, and this is exactly

    h' = h + sum over f in S with a_f > 0 of (v_f - a_f) W_dec[f],   v_f = -c.

So only their rows are needed, and neither the other latents nor the decoder's bias. All is computed
in float32 (float64 for such models), whatever the model's own precision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn.errors import UserError, unknown
from unlearn.head import upcast
from unlearn.sae.dictionary import Dictionary, Encoder

Mode = Literal["clamp", "zero", "scale", "random"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Clamp:
    """Latents of one dictionary, by their numbers there, and what is done where they are active.

    An active latent's value a changes by ``-(offset + factor * a)``, along its row of
    ``directions``: ``clamp`` has offset c and factor 1, ``zero`` 0 and 1, ``scale`` 0 and c.
    ``random`` is the control of arXiv:2410.19278: gate and amount of ``clamp``, but the direction
    of another latent. Ours: it is the next one that is not chosen, as long as the right one.
    ``encoder`` is that of the chosen latents alone; a ``topk`` dictionary needs all of them to know
    which are the k largest.
    """

    layer: int
    features: tuple[int, ...]
    encoder: Encoder
    directions: Float[Tensor, "chosen width"]
    mode: str
    offset: float
    factor: float

    @classmethod
    def of(
        cls,
        dictionary: Dictionary,
        features: Sequence[int],
        *,
        layer: int,
        mode: str = "clamp",
        c: float = 0.0,
    ) -> "Clamp":
        """Clamp features of a dictionary; ``c`` is in units of its activations.

        In mode ``scale``, c is a factor: 1 takes the latent away, 2 turns it over.

        Raises:
            UserError: a feature that the dictionary does not have or that is named twice, an
                unknown mode, a c that is not above 0 where the mode needs it.
        """
        check_features(dictionary, features)
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if mode != "zero" and not (math.isfinite(c) and c > 0):
            raise UserError(f"c={c} given with mode {mode}", "give a number above 0")
        whole = dictionary.kind == "topk"
        return cls(
            layer,
            tuple(features),
            dictionary.encoder(None if whole else features),
            _directions(dictionary, features, others=mode == "random"),
            mode,
            offset=c if mode in ("clamp", "random") else 0.0,
            factor=c if mode == "scale" else 1.0,
        )

    def active(self, hidden: Float[Tensor, "*token width"]) -> Float[Tensor, "*token chosen"]:
        """Give the values of the chosen latents, 0 where they are not active."""
        found = self.encoder.encode(hidden)
        return found[..., list(self.features)] if self.encoder.kind == "topk" else found

    def change(self, hidden: Float[Tensor, "*token width"]) -> Float[Tensor, "*token width"]:
        """Give what is to be added to hidden states; 0 where no chosen latent is active."""
        a = self.active(hidden)
        return -((self.offset + self.factor * a) * (a > 0)) @ self.directions

    def __call__(self, hidden: Float[Tensor, "*token width"]) -> Float[Tensor, "*token width"]:
        """Give hidden states with the change, in their own precision."""
        wide = upcast(hidden)
        return (wide + self.to(wide).change(wide)).to(hidden.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Give its weights by name."""
        return {**self.encoder.tensors(), "directions": self.directions}

    @classmethod
    def rebuilt(cls, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Clamp":
        """Build a clamp from what :meth:`about` and :meth:`tensors` say of it."""
        weights: dict[str, Any] = {n: one for n, one in tensors.items() if n != "directions"}
        encoder = Encoder(about["kind"], **weights, k=about["k"], centred=about["centred"])
        return cls(
            about["layer"],
            tuple(about["features"]),
            encoder,
            tensors["directions"],
            about["mode"],
            about["offset"],
            about["factor"],
        )

    def to(self, like: Tensor) -> "Clamp":
        """Give the clamp on the device and in the precision of a tensor."""
        own = self.directions
        if own.device == like.device and own.dtype == like.dtype:
            return self
        moved = {name: one.to(like) for name, one in self.tensors().items()}
        return Clamp.rebuilt(self.about(), moved)

    def about(self) -> dict[str, Any]:
        """Say what it is, without its weights."""
        return {
            "layer": self.layer,
            "features": list(self.features),
            "kind": self.encoder.kind,
            "k": self.encoder.k,
            "centred": self.encoder.centred,
            "mode": self.mode,
            "offset": self.offset,
            "factor": self.factor,
        }


def check_features(dictionary: Dictionary, features: Sequence[int]) -> None:
    """Refuse features that a dictionary does not have, or one named twice.

    Raises:
        UserError: names the first.
    """
    if absent := [one for one in features if not 0 <= one < dictionary.latents]:
        raise UserError(
            f"feature {absent[0]} given, but the dictionary has {dictionary.latents:,}",
            f"give 0 to {dictionary.latents - 1}",
        )
    if twice := [one for place, one in enumerate(features) if one in features[:place]]:
        raise UserError(f"feature {twice[0]} is given twice", "name each feature once")


def _directions(dictionary: Dictionary, features: Sequence[int], *, others: bool) -> Tensor:
    """Give the rows of the chosen latents, or as long ones of others."""
    rows = dictionary.w_dec[list(features)]
    if not others:
        return rows
    found = dictionary.w_dec[_unchosen(features, dictionary.latents)]
    lengths = found.norm(dim=1).clamp_min(torch.finfo(found.dtype).tiny)
    return found * (rows.norm(dim=1) / lengths)[:, None]


def _unchosen(features: Sequence[int], latents: int) -> list[int]:
    """Give for each feature the next one that is not chosen, the first after the last."""
    chosen = set(features)
    if len(chosen) == latents:
        raise UserError("every feature is chosen, so there is no other direction", "choose fewer")
    found = []
    for one in features:
        other = (one + 1) % latents
        while other in chosen:
            other = (other + 1) % latents
        found.append(other)
    return found
