"""A dictionary: its weights, and what they make of an activation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from unlearn.errors import UserError
from unlearn.sae.activation import gated, thresholded, top_k
from unlearn.sae.hook import Hook

Kind = Literal["relu", "topk", "batchtopk", "jumprelu", "gated", "mutual", "feature"]
KINDS: tuple[str, ...] = get_args(Kind)
OF_BATCH = ("batchtopk", "mutual", "feature")
"""Kinds that choose among the tokens of a whole batch while they are trained."""
REQUIRED = ("w_enc", "b_enc", "w_dec", "b_dec")
TENSORS = (*REQUIRED, "threshold", "r_mag", "b_mag")
CODED = ("w_enc", "b_enc", "threshold", "r_mag", "b_mag")
"""Weights of an encoder whose last axis is the latents."""


class Encoding:
    """How activations become latents, from the weights of a dictionary or of a part of one."""

    kind: Kind
    w_enc: Float[Tensor, "width latent"]
    b_enc: Float[Tensor, " latent"]
    b_dec: Float[Tensor, " width"]
    threshold: Float[Tensor, " latent"] | None
    r_mag: Float[Tensor, " latent"] | None
    b_mag: Float[Tensor, " latent"] | None
    k: int | None
    centred: bool

    @property
    def width(self) -> int:
        """Give the size of the activations."""
        return len(self.b_dec)

    @property
    def latents(self) -> int:
        """Give the number of latents (features, directions)."""
        return len(self.b_enc)

    def pre(self, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token latent"]:
        """Give what enters the activation function; in a gated dictionary what enters the gate."""
        return (x - self.b_dec if self.centred else x) @ self.w_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token latent"]:
        """Give the latents of each token, whatever other tokens there are.

        Kinds of :data:`OF_BATCH` use their threshold here, as JumpReLU does.

        Raises:
            UserError: such a kind has no threshold yet.
        """
        pre = self.pre(x)
        if self.kind == "relu":
            return pre.relu()
        if self.kind == "topk":
            assert self.k is not None
            return top_k(pre, self.k)
        if self.kind == "gated":
            return gated(pre, self.magnitude(pre))
        if self.threshold is None:
            raise UserError(
                f"this {self.kind} dictionary has no threshold, so tokens cannot be encoded alone",
                "train it to its end: thresholds are measured in the second half",
            )
        return thresholded(pre, self.threshold)

    def magnitude(self, pi: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token latent"]:
        """Give what enters the magnitudes of a gated dictionary, from what enters its gate.

        ``x W_enc e^{r_mag} + b_mag``: both share W_enc (Rajamanoharan et al. 2024).
        """
        assert self.r_mag is not None
        assert self.b_mag is not None
        return (pi - self.b_enc) * self.r_mag.exp() + self.b_mag


@dataclass(frozen=True)
class Encoder(Encoding):
    """Encoders of some latents, without their directions; see :class:`Dictionary`."""

    kind: Kind
    w_enc: Float[Tensor, "width latent"]
    b_enc: Float[Tensor, " latent"]
    b_dec: Float[Tensor, " width"]
    threshold: Float[Tensor, " latent"] | None = None
    r_mag: Float[Tensor, " latent"] | None = None
    b_mag: Float[Tensor, " latent"] | None = None
    k: int | None = None
    centred: bool = True

    def tensors(self) -> dict[str, Tensor]:
        """Give the weights that there are, by name."""
        return _tensors(self)


@dataclass(frozen=True)
class Dictionary(Encoding):
    """Weights of a sparse autoencoder, with its kind and the place it belongs to.

    ``centred``: the decoder's bias is taken off the inputs. ``b_enc`` is the gate's bias in a gated
    dictionary, which has ``r_mag`` and ``b_mag`` too. ``threshold`` belongs to ``jumprelu``, and to
    the kinds of :data:`OF_BATCH` once they are trained. ``k``: active latents per token, for
    ``topk`` exactly. ``hook`` is None where a file does not say. ``about``: how it was trained.
    """

    kind: Kind
    w_enc: Float[Tensor, "width latent"]
    b_enc: Float[Tensor, " latent"]
    w_dec: Float[Tensor, "latent width"]
    b_dec: Float[Tensor, " width"]
    threshold: Float[Tensor, " latent"] | None = None
    r_mag: Float[Tensor, " latent"] | None = None
    b_mag: Float[Tensor, " latent"] | None = None
    k: int | None = None
    centred: bool = True
    hook: Hook | None = None
    model: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, a: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token width"]:
        """Give the activations that latents stand for."""
        return a @ self.w_dec + self.b_dec

    def reconstruct(self, x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token width"]:
        """Give what is left of activations after encoding and decoding."""
        return self.decode(self.encode(x))

    def encoder(self, latents: Sequence[int] | None = None) -> Encoder:
        """Give the encoder of these latents in this order, or of all.

        Each then comes out as it would of the whole dictionary, unless the kind is ``topk``: which
        latents are among the k largest of a token only the whole encoder knows.
        """
        if latents is None:
            weights = {name: one for name, one in self.tensors().items() if name != "w_dec"}
            return Encoder(self.kind, **weights, k=self.k, centred=self.centred)
        assert self.kind != "topk"
        places = torch.tensor(latents, dtype=torch.long, device=self.b_enc.device)
        weights = {name: one[..., places] for name, one in self.tensors().items() if name in CODED}
        return Encoder(self.kind, b_dec=self.b_dec, **weights, k=self.k, centred=self.centred)

    def norms(self) -> Float[Tensor, " latent"]:
        """Give the length of every latent's direction."""
        return self.w_dec.norm(dim=1)

    def folded(self, scale: float) -> "Dictionary":
        """Give the dictionary of plain activations, from one of activations times ``scale``.

        Latents stay as they are, reconstructions come out in the plain units.
        """
        inputs = self.w_enc * scale
        return replace(self, w_enc=inputs, w_dec=self.w_dec / scale, b_dec=self.b_dec / scale)

    def normed(self) -> "Dictionary":
        """Give the same dictionary with directions of length 1: latents carry their lengths.

        Not for ``topk``, where another latent could then be among the k largest.
        """
        assert self.kind != "topk"
        norms = self.norms()
        changed: dict[str, Any] = {"w_dec": self.w_dec / norms[:, None]}
        if self.kind == "gated":
            assert self.r_mag is not None
            assert self.b_mag is not None
            return replace(
                self, **changed, r_mag=self.r_mag + norms.log(), b_mag=self.b_mag * norms
            )
        changed |= {"w_enc": self.w_enc * norms, "b_enc": self.b_enc * norms}
        if self.threshold is not None:
            changed["threshold"] = self.threshold * norms
        return replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """Give the weights that there are, by name."""
        return _tensors(self)

    def to(self, device: torch.device | str) -> "Dictionary":
        """Give the dictionary on another device."""
        moved: dict[str, Any] = {name: one.to(device) for name, one in self.tensors().items()}
        return replace(self, **moved)


def _tensors(weights: Encoding) -> dict[str, Tensor]:
    found = ((name, getattr(weights, name, None)) for name in TENSORS)
    return {name: value for name, value in found if value is not None}


def built(source: str, kind: Kind, weights: Mapping[str, Tensor], **more: Any) -> Dictionary:
    """Build a dictionary from weights that came from outside; ``source`` is what errors call it.

    Raises:
        UserError: weights are missing, do not fit together or are no numbers; names the tensor.
    """
    needed = {"gated": ("r_mag", "b_mag"), "jumprelu": ("threshold",)}.get(kind, ())
    if missing := [name for name in (*REQUIRED, *needed) if name not in weights]:
        raise UserError(
            f"'{source}': a {kind} dictionary needs {', '.join(missing)}",
            f"it has {', '.join(sorted(weights))}",
        )
    _check_shapes(source, weights)
    latents, k = len(weights["w_dec"]), more.get("k")
    if kind == "topk" and not 0 < (k or 0) <= latents:
        raise UserError(
            f"'{source}': k={k} given for a topk dictionary of {latents} latents",
            f"k is 1 to {latents}",
        )
    return Dictionary(kind, **{**weights, **more})


def _check_shapes(source: str, weights: Mapping[str, Tensor]) -> None:
    if (decoder := weights["w_dec"]).ndim != 2:
        raise UserError(f"'{source}': w_dec has shape {list(decoder.shape)}", "it has 2 axes")
    latents, width = decoder.shape
    shapes = {"w_enc": (width, latents), "w_dec": (latents, width), "b_dec": (width,)}
    for name, tensor in weights.items():
        wanted = shapes.get(name, (latents,))
        if tuple(tensor.shape) != wanted:
            raise UserError(
                f"'{source}': {name} has shape {list(tensor.shape)}, not {list(wanted)}",
                f"W_dec says {latents} latents of width {width}; one of them lies otherwise",
            )
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"'{source}' has NaN or infinite weights, in {name} first",
                "copy it again, or take an earlier checkpoint",
            )


def check_fits(found: Dictionary, width: int, layer: int | None = None, *, source: str) -> None:
    """Refuse a dictionary of activations of another width, or of another layer.

    Raises:
        UserError: names both.
    """
    if found.width != width:
        raise UserError(
            f"'{source}' is for activations of width {found.width}, the model's have {width}",
            f"give a dictionary trained on {found.model or 'this model'}, or that model",
        )
    if layer is None or found.hook is None:
        return
    if found.hook.leaves != layer:
        where = found.hook.leaves
        use = f"use --layer {where}" if where is not None else "it reads no layer's output"
        raise UserError(
            f"'{source}' belongs to {found.hook}, not to the output of layer {layer}", use
        )
