"""Readers of the formats in which dictionaries are published; each is given a folder.

All give float32 weights laid out ``W_enc [width, latent]``, ``W_dec [latent, width]``.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unlearn.errors import UserError
from unlearn.sae.dictionary import Dictionary, built
from unlearn.sae.hook import Hook

AGAIN = "copy or download it again"


def saelens(folder: Path) -> Dictionary:
    """Read SAELens: ``cfg.json`` and ``sae_weights.safetensors``.

    Before version 6 all keys of the configuration lay flat.
    """
    config = _json(folder / "cfg.json")
    weights = _tensors(folder / "sae_weights.safetensors")
    more = config.get("metadata") or config.get("meta") or {}
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if architecture == "standard" and function == "topk":
        architecture = "topk"
    kinds = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
    kind = _one_of(folder, "architecture", architecture, kinds)
    _require_plain_inputs(folder, config)
    scale = weights.get("scaling_factor")
    if scale is not None and not bool(torch.allclose(scale, torch.ones_like(scale))):
        raise UserError(
            f"'{folder}' has a scaling_factor for its latents, which is not read",
            "fold it into the weights with SAELens first",
        )
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        weights = _by_norms(weights)
    hook = config.get("hook_name") or config.get("hook_point") or more.get("hook_name") or ""
    return built(
        str(folder),
        kind,
        _standard(folder, weights, kind),
        k=int(k) if kind == "topk" and k else None,
        centred=bool(config.get("apply_b_dec_to_input", True)),
        hook=Hook.parse(hook),
        model=config.get("model_name") or more.get("model_name") or "",
        about={"format": "SAELens", "hook": hook},
    )


def _by_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the directions' lengths into the encoder: the k largest are those of a_f ||W_dec[f]||."""
    norms = weights["W_dec"].norm(dim=1)
    return {
        **weights,
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
        "W_dec": weights["W_dec"] / norms[:, None],
    }


def _require_plain_inputs(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse inputs that are normalised token by token, or by a factor that the file has not."""
    how = config.get("normalize_activations") or "none"
    if how in (True, "expected_average_only_in"):
        raise UserError(
            f"'{folder}' expects activations scaled by a factor (normalize_activations: "
            f"{how}) that its files do not hold",
            "fold it into the weights with SAELens (fold_activation_norm_scaling_factor) first",
        )
    if how not in (False, "none"):
        raise UserError(
            f"'{folder}' expects activations normalised token by token ({how}), which is not read",
            "normalize_activations is none in what can be read",
        )


def gemma_scope(folder: Path) -> Dictionary:
    """Read Gemma Scope: ``layer_L/width_Wk/average_l0_N/params.npz`` (arXiv:2408.05147).

    JumpReLU; the decoder's bias is not taken off. The repository's name tells the site: ``-res``
    (what leaves the layer; also where it is not seen), ``-mlp``, ``-att``.
    """
    path = folder / "params.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            weights = {_capital(n): torch.from_numpy(np.asarray(file[n])) for n in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            why = "holds pickled objects, which may run code when they are read: they are not"
            raise UserError(f"'{path}' {why}", "save plain arrays of numbers") from error
        raise UserError(f"cannot read '{path}': {error}", AGAIN) from error
    names = "/".join(folder.absolute().parts[-6:])
    layer = re.search(r"layer_(\d+)", names)
    site = next((s for mark, s in SCOPE_SITES.items() if mark in names), "resid_post")
    return built(
        str(folder),
        "jumprelu",
        _standard(folder, {n: one.float() for n, one in weights.items()}, "jumprelu"),
        centred=False,
        hook=Hook(int(layer[1]), site) if layer else None,  # type: ignore[arg-type]
        about={"format": "Gemma Scope"},
    )


SCOPE_SITES = {"-mlp": "mlp_out", "-att": "attn_z"}


def gemma_scope_2(folder: Path) -> Dictionary:
    """Read Gemma Scope 2: ``config.json`` and ``params.safetensors``, keys in lower case."""
    config = _json(folder / "config.json")
    weights = {_capital(name): one for name, one in _tensors(folder / "params.safetensors").items()}
    place = config.get("hf_hook_point_in", "")
    _require_same_place(folder, place, config.get("hf_hook_point_out", place))
    return built(
        str(folder),
        "jumprelu",
        _standard(folder, weights, "jumprelu"),
        centred=False,
        hook=Hook.parse(place),
        model=config.get("model_name", ""),
        about={"format": "Gemma Scope 2", "hook": place},
    )


def llama_scope(folder: Path) -> Dictionary:
    """Read Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``.

    Inputs were scaled to the mean length sqrt(width), which is folded into the weights. The one
    threshold for all latents is one of plain inputs, so it is scaled as they are (arXiv:2410.20526;
    both as SAELens does).
    """
    config = _json(folder / "hyperparams.json")
    found = _linear(folder, _tensors(folder / "checkpoints/final.safetensors"))
    norms = _key(folder, config, "dataset_average_activation_norm")
    scale = math.sqrt(len(found["b_dec"])) / float(_key(folder, norms, "in"))
    threshold = scale * float(_key(folder, config, "jump_relu_threshold"))
    place = str(config.get("hook_point_in", ""))
    _require_same_place(folder, place, config.get("hook_point_out", place))
    plain = built(
        str(folder),
        "jumprelu",
        found | {"threshold": torch.full_like(found["b_enc"], threshold)},
        centred=False,
        hook=Hook.parse(place),
        about={"format": "Llama Scope", "hook": place},
    )
    return plain.folded(scale)


def _require_same_place(folder: Path, reads: str, writes: str) -> None:
    if reads != writes:
        raise UserError(
            f"'{folder}' is a transcoder: it reads {reads} and writes {writes}",
            "give a dictionary that reconstructs what it reads",
        )


def sparsify(folder: Path) -> Dictionary:
    """Read EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors`` in ``layers.5``.

    TopK; the decoder's bias is taken off. W_dec is told from its transpose by its shape.
    """
    config, weights = _json(folder / "cfg.json"), _tensors(folder / "sae.safetensors")
    if config.get("transcode") or "W_skip" in weights:
        raise UserError(
            f"'{folder}' is a transcoder", "give a dictionary that reconstructs what it reads"
        )
    kind = _one_of(folder, "activation", config.get("activation", "topk"), {"topk": "topk"})
    encoder = _key(folder, weights, "encoder.weight")
    decoder = _key(folder, weights, "W_dec")
    if decoder.shape != encoder.shape and decoder.t().shape == encoder.shape:
        decoder = decoder.t()
    found = {
        "w_enc": encoder.t(),
        "b_enc": _key(folder, weights, "encoder.bias"),
        "w_dec": decoder,
        "b_dec": _key(folder, weights, "b_dec"),
    }
    return built(
        str(folder),
        kind,
        found,
        k=int(_key(folder, config, "k")),
        hook=Hook.parse(folder.absolute().name),
        about={"format": "sparsify"},
    )


def dictionary_learning(folder: Path) -> Dictionary:
    """Read dictionary_learning: ``config.json`` and ``ae.pt``, of which weights alone are taken.

    BatchTopK is read with its threshold, as JumpReLU. Gated and JumpReLU dictionaries there
    multiply latents by the lengths of their directions: these come out with directions of length 1.
    """
    weights = _pickled_weights(folder / "ae.pt")
    trainer = _key(folder, _json(folder / "config.json"), "trainer")
    name = trainer.get("dict_class", "AutoEncoder")
    read = _one_of(folder, "dict_class", name, LEARNT)
    found: Dictionary = read(folder, weights, trainer)
    hook = Hook(int(trainer["layer"])) if _leaves_layer(trainer) else None
    about = {"format": "dictionary_learning", "dict_class": name}
    return replace(found, hook=hook, model=trainer.get("lm_name") or "", about=about)


def _leaves_layer(trainer: Mapping[str, Any]) -> bool:
    name = str(trainer.get("submodule_name") or "resid_post")
    return trainer.get("layer") is not None and "resid_post" in name


def _learnt_relu(folder: Path, weights: Mapping[str, Tensor], trainer: Any) -> Dictionary:
    centred = "bias" in weights  # AutoEncoderNew has decoder.bias, and takes nothing off
    return built(str(folder), "relu", _linear(folder, weights), centred=centred)


def _learnt_topk(folder: Path, weights: Mapping[str, Tensor], trainer: Any) -> Dictionary:
    k = weights.get("k", trainer.get("k"))
    if k is None:
        raise UserError(f"'{folder}' tells no k", "give config.json as it was published")
    return built(str(folder), "topk", _linear(folder, weights), k=int(k))


def _learnt_batch(folder: Path, weights: Mapping[str, Tensor], trainer: Any) -> Dictionary:
    found = _linear(folder, weights)
    threshold = float(_key(folder, weights, "threshold"))
    if threshold < 0:
        raise UserError(
            f"'{folder}' has no threshold yet ({threshold}), so tokens cannot be encoded alone",
            "give a later checkpoint",
        )
    found["threshold"] = torch.full_like(found["b_enc"], threshold)
    return built(str(folder), "jumprelu", found)


def _learnt_jump(folder: Path, weights: Mapping[str, Tensor], trainer: Any) -> Dictionary:
    standard = _standard(folder, weights, "jumprelu")
    return built(str(folder), "jumprelu", standard, centred=False).normed()


def _learnt_gated(folder: Path, weights: Mapping[str, Tensor], trainer: Any) -> Dictionary:
    renamed = {**weights, "encoder.bias": _key(folder, weights, "gate_bias")}
    more: dict[str, Any] = {
        "r_mag": _key(folder, weights, "r_mag"),
        "b_mag": _key(folder, weights, "mag_bias"),
    }
    return built(str(folder), "gated", _linear(folder, renamed) | more).normed()


LEARNT: dict[str, Callable[[Path, Mapping[str, Tensor], Any], Dictionary]] = {
    "AutoEncoder": _learnt_relu,
    "AutoEncoderNew": _learnt_relu,
    "AutoEncoderTopK": _learnt_topk,
    "BatchTopKSAE": _learnt_batch,
    "MatryoshkaBatchTopKSAE": _learnt_batch,
    "JumpReluAutoEncoder": _learnt_jump,
    "GatedAutoEncoder": _learnt_gated,
}


def _pickled_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict with torch's own unpickler, which builds tensors and runs nothing else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"'{path}' holds something other than weights, which is not unpickled",
            "save the state dict alone, or as safetensors",
        ) from error
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        raise UserError(f"'{path}' is no state dict of tensors", "save the state dict alone")
    return {name: one if one.ndim == 0 else one.float() for name, one in found.items()}


def _standard(folder: Path, weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Take the tensors of SAELens and Gemma Scope, which lie as ours do."""
    names = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec"}
    if kind == "gated":
        names |= {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
    if kind == "jumprelu":
        names["threshold"] = "threshold"
    return {ours: _key(folder, weights, theirs) for ours, theirs in names.items()}


def _linear(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of two ``nn.Linear``: weights [out, in], so transposed."""
    biases = ("b_dec", "bias", "decoder_bias", "decoder.bias")
    name = next((one for one in biases if one in weights), "b_dec")
    return {
        "w_enc": _key(folder, weights, "encoder.weight").t(),
        "b_enc": _key(folder, weights, "encoder.bias"),
        "w_dec": _key(folder, weights, "decoder.weight").t(),
        "b_dec": _key(folder, weights, name),
    }


def _capital(name: str) -> str:
    """Give ``W_enc`` for ``w_enc``; biases are small everywhere."""
    lower = name.lower()
    return "W" + lower[1:] if lower.startswith("w_") else lower


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return {name: one.float() for name, one in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read '{path}': {error}", AGAIN) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise UserError(f"'{path}' {why}", "it tells how the weights beside it are used") from error
    if not isinstance(found, dict):
        raise UserError(f"'{path}' is no JSON object", AGAIN)
    return found


def _key(folder: Path, found: Mapping[str, Any], name: str) -> Any:
    if name not in found:
        raise UserError(
            f"'{folder}' has no '{name}'", f"it has {', '.join(sorted(found)) or 'nothing'}"
        )
    return found[name]


def _one_of(folder: Path, what: str, given: str, known: Mapping[str, Any]) -> Any:
    if given not in known:
        raise UserError(f"'{folder}': unknown {what} '{given}'", f"one of {', '.join(known)}")
    return known[given]
