"""Dictionaries written as others read them: so far as SAELens does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from unlearn.errors import UserError, unknown
from unlearn.runs import staged, write_json, write_tensors
from unlearn.sae.dictionary import Dictionary

SAELENS = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
"""Our kinds, and what SAELens calls their architectures."""
LAYOUT = "6.0.0"
"""The SAELens version since which ``cfg.json`` is laid out like this; it reads older ones apart."""


def export(dictionary: Dictionary, out: Path, *, form: str = "saelens") -> dict[str, Any]:
    """Write a dictionary into a new folder in a public format; give its configuration.

    Raises:
        UserError: an unknown format, a folder that exists, or a kind that the format has not.
    """
    if form not in EXPORTS:
        raise unknown("format", form, EXPORTS)
    if out.exists():
        raise UserError(f"'{out}' already exists", "choose another --out, or remove it")
    config, weights = EXPORTS[form](dictionary)
    with staged(out) as folder:
        write_json(folder / "cfg.json", config)
        tensors = {name: one.float().cpu().contiguous() for name, one in weights.items()}
        write_tensors(folder / "sae_weights.safetensors", tensors, {"format": "pt"})
    return config


def saelens(dictionary: Dictionary) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give ``cfg.json`` and the tensors of SAELens, version 6.

    Kinds that choose among a batch are its ``jumprelu``, with their thresholds, as it saves them.

    Raises:
        UserError: such a kind has no thresholds yet.
    """
    kind: str = dictionary.kind
    if kind not in SAELENS:
        if dictionary.threshold is None:
            raise UserError(
                f"this {kind} dictionary has no threshold, and SAELens knows no {kind} without",
                "train it to its end: thresholds are measured in the second half",
            )
        kind = "jumprelu"
    config: dict[str, Any] = {
        "architecture": SAELENS[kind],
        "d_in": dictionary.width,
        "d_sae": dictionary.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.centred,
        "normalize_activations": "none",
        "reshape_activations": _reshaped(dictionary),
        "metadata": _metadata(dictionary),
    }
    if kind == "topk":
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    return config, _tensors(dictionary, kind)


def _reshaped(dictionary: Dictionary) -> str:
    """Attention's heads lie in an axis of their own where SAELens reads ``hook_z``."""
    at_heads = dictionary.hook is not None and dictionary.hook.site == "attn_z"
    return "hook_z" if at_heads else "none"


def _metadata(dictionary: Dictionary) -> dict[str, Any]:
    about = dictionary.about
    place = str(dictionary.hook) if dictionary.hook else about.get("hook")
    found = {"sae_lens_version": LAYOUT, "sae_lens_training_version": None}
    found |= {"hook_name": place} if place else {}
    found |= {"model_name": dictionary.model} if dictionary.model else {}
    if context := about.get("settings", {}).get("context"):
        found["context_size"] = context
    return found


def _tensors(dictionary: Dictionary, kind: str) -> dict[str, Tensor]:
    found = {"W_enc": dictionary.w_enc, "W_dec": dictionary.w_dec, "b_dec": dictionary.b_dec}
    found["b_gate" if kind == "gated" else "b_enc"] = dictionary.b_enc
    of_kind = {"gated": ("r_mag", "b_mag"), "jumprelu": ("threshold",)}.get(kind, ())
    every = dictionary.tensors()
    return found | {name: every[name] for name in of_kind}


EXPORTS: dict[str, Callable[[Dictionary], tuple[dict[str, Any], dict[str, Tensor]]]] = {
    "saelens": saelens
}
"""What can be written, by the name of the format."""
