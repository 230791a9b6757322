"""Files made in the exact layouts in which dictionaries are published, and read back.

What each must encode to is written out here as the publisher's own code does it.
"""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unlearn.errors import UserError
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.hook import Hook
from unlearn.sae.storage import load_dictionary, save_dictionary

WIDTH, LATENTS = 6, 10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = draw(30, WIDTH, seed=9)
W_ENC, W_DEC = draw(WIDTH, LATENTS), draw(LATENTS, WIDTH, seed=1)
B_ENC, B_DEC, THETA = draw(LATENTS, seed=2), draw(WIDTH, seed=3), draw(LATENTS, seed=4).abs()
PRE, CENTRED = X @ W_ENC + B_ENC, (X - B_DEC) @ W_ENC + B_ENC
NORMS = W_DEC.norm(dim=1)


def top(values: Tensor, k: int) -> Tensor:
    found = values.topk(k)
    return torch.zeros_like(values).scatter(-1, found.indices, found.values.relu())


def write(folder: Path, config: tuple[str, Any] | None, weights: tuple[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / config[0]).write_text(json.dumps(config[1]))
    place = folder / weights[0]
    place.parent.mkdir(exist_ok=True)
    tensors = {name: one.contiguous() for name, one in weights[1].items()}
    if place.suffix == ".npz":
        np.savez(place, **{name: one.numpy() for name, one in tensors.items()})
    elif place.suffix == ".pt":
        torch.save(tensors, place)
    else:
        save_file(tensors, place)
    return folder


def check(found: Dictionary, latents: Tensor, reconstruction: Tensor) -> None:
    assert 0 < float((latents > 0).float().mean()) < 0.9
    torch.testing.assert_close(found.encode(X), latents)
    torch.testing.assert_close(found.reconstruct(X), reconstruction)
    assert all(one.dtype == torch.float32 for one in found.tensors().values())


STANDARD = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
SAELENS = {"d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "normalize_activations": "none",
           "metadata": {"hook_name": "blocks.9.hook_resid_pre", "model_name": "gemma-2b-it",
                        "sae_lens_version": "6.54.12"}}  # fmt: skip


def test_saelens_standard(tmp_path: Path) -> None:
    config = SAELENS | {"architecture": "standard"}
    folder = write(tmp_path, ("cfg.json", config), ("sae_weights.safetensors", STANDARD))
    found = load_dictionary(folder)
    check(found, CENTRED.relu(), CENTRED.relu() @ W_DEC + B_DEC)
    assert (found.hook, found.hook and found.hook.leaves) == (Hook(9, "resid_pre"), 8)
    assert (found.kind, found.model) == ("relu", "gemma-2b-it")
    again = load_dictionary(folder / "sae_weights.safetensors")
    assert torch.equal(again.encode(X), found.encode(X))


def test_saelens_jumprelu_without_centring(tmp_path: Path) -> None:
    config = SAELENS | {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    weights = STANDARD | {"threshold": THETA}
    folder = write(tmp_path, ("cfg.json", config), ("sae_weights.safetensors", weights))
    latents = PRE.relu() * (PRE > THETA)
    check(load_dictionary(folder), latents, latents @ W_DEC + B_DEC)


def test_saelens_gated(tmp_path: Path) -> None:
    r_mag, b_mag = draw(LATENTS, seed=5), draw(LATENTS, seed=6)
    weights = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "b_gate": B_ENC,
               "r_mag": r_mag, "b_mag": b_mag}  # fmt: skip
    config = SAELENS | {"architecture": "gated"}
    folder = write(tmp_path, ("cfg.json", config), ("sae_weights.safetensors", weights))
    magnitude = (X - B_DEC) @ (W_ENC * r_mag.exp()) + b_mag
    latents = (CENTRED > 0) * magnitude.relu()
    check(load_dictionary(folder), latents, latents @ W_DEC + B_DEC)


@pytest.mark.parametrize("rescaled", [False, True])
def test_saelens_topk(tmp_path: Path, rescaled: bool) -> None:
    config = SAELENS | {
        "architecture": "topk",
        "k": 3,
        "rescale_acts_by_decoder_norm": rescaled,
    }
    folder = write(tmp_path, ("cfg.json", config), ("sae_weights.safetensors", STANDARD))
    latents = top(CENTRED * NORMS if rescaled else CENTRED, 3)
    directions = W_DEC / NORMS[:, None] if rescaled else W_DEC
    check(load_dictionary(folder), latents, latents @ directions + B_DEC)


def test_saelens_before_version_6(tmp_path: Path) -> None:
    config = {"d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "architecture": "standard",
              "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "hook_layer": 5,
              "hook_name": "blocks.5.hook_resid_post", "model_name": "gpt2-small",
              "normalize_activations": False, "scaling": None}  # fmt: skip
    weights = STANDARD | {"scaling_factor": torch.ones(LATENTS)}
    folder = write(tmp_path, ("cfg.json", config), ("sae_weights.safetensors", weights))
    found = load_dictionary(folder)
    check(found, top(CENTRED, 4), top(CENTRED, 4) @ W_DEC + B_DEC)
    assert (found.hook, found.model) == (Hook(5), "gpt2-small")


@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope(tmp_path: Path, lower: bool) -> None:
    weights = STANDARD | {"threshold": THETA}
    weights = {name.lower() if lower else name: one for name, one in weights.items()}
    place = tmp_path / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_59"
    found = load_dictionary(write(place, None, ("params.npz", weights)))
    latents = PRE.relu() * (PRE > THETA)
    check(found, latents, latents @ W_DEC + B_DEC)
    assert found.hook == Hook(3)
    assert load_dictionary(place / "params.npz").hook == Hook(3)


def test_gemma_scopes_repository_tells_the_site(tmp_path: Path) -> None:
    place = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_7" / "width_16k" / "average_l0_10"
    write(place, None, ("params.npz", STANDARD | {"threshold": THETA}))
    assert load_dictionary(place).hook == Hook(7, "mlp_out")


def test_gemma_scope_2(tmp_path: Path) -> None:
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-it",
              "hf_hook_point_in": "model.layers.13.output",
              "hf_hook_point_out": "model.layers.13.output"}  # fmt: skip
    weights = {name.lower(): one for name, one in STANDARD.items()} | {"threshold": THETA}
    found = load_dictionary(
        write(tmp_path, ("config.json", config), ("params.safetensors", weights))
    )
    latents = PRE.relu() * (PRE > THETA)
    check(found, latents, latents @ W_DEC + B_DEC)
    assert (found.hook, found.model) == (Hook(13), "google/gemma-3-1b-it")


def test_llama_scope(tmp_path: Path) -> None:
    """Scaled inputs, one threshold of plain inputs; the reconstruction is scaled back."""
    config = {"d_model": WIDTH, "d_sae": LATENTS, "jump_relu_threshold": 0.25,
              "hook_point_in": "blocks.15.hook_resid_post",
              "hook_point_out": "blocks.15.hook_resid_post",
              "dataset_average_activation_norm": {"in": 1.5, "out": 1.5}}  # fmt: skip
    weights = {"encoder.weight": W_ENC.t(), "encoder.bias": B_ENC,
               "decoder.weight": W_DEC.t(), "decoder.bias": B_DEC}  # fmt: skip
    place = ("checkpoints/final.safetensors", weights)
    found = load_dictionary(write(tmp_path, ("hyperparams.json", config), place))
    scale = math.sqrt(WIDTH) / 1.5
    pre = X * scale @ W_ENC + B_ENC
    latents = pre.relu() * (pre > 0.25 * scale)
    check(found, latents, (latents @ W_DEC + B_DEC) / scale)
    assert found.hook == Hook(15)
    direct = load_dictionary(tmp_path / "checkpoints" / "final.safetensors")
    assert torch.equal(direct.encode(X), found.encode(X))


@pytest.mark.parametrize("turned", [False, True])
def test_sparsify(tmp_path: Path, turned: bool) -> None:
    config = {"activation": "topk", "k": 3, "expansion_factor": 32, "normalize_decoder": True,
              "num_latents": LATENTS, "multi_topk": False, "d_in": WIDTH}  # fmt: skip
    weights = {"encoder.weight": W_ENC.t(), "encoder.bias": B_ENC,
               "W_dec": W_DEC.t() if turned else W_DEC, "b_dec": B_DEC}  # fmt: skip
    place = tmp_path / "layers.5"
    found = load_dictionary(write(place, ("cfg.json", config), ("sae.safetensors", weights)))
    check(found, top(CENTRED, 3), top(CENTRED, 3) @ W_DEC + B_DEC)
    assert found.hook == Hook(5)


TRAINER = {"layer": 8, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_8",
           "activation_dim": WIDTH, "dict_size": LATENTS}  # fmt: skip
LINEAR = {"encoder.weight": W_ENC.t(), "decoder.weight": W_DEC.t()}


def learnt(tmp_path: Path, weights: dict[str, Tensor], **trainer: Any) -> Dictionary:
    config = {"trainer": TRAINER | trainer, "buffer": {"ctx_len": 1024}}
    return load_dictionary(write(tmp_path, ("config.json", config), ("ae.pt", weights)))


def test_dictionary_learning_standard(tmp_path: Path) -> None:
    weights = LINEAR | {"encoder.bias": B_ENC, "bias": B_DEC}
    found = learnt(tmp_path, weights, dict_class="AutoEncoder")
    check(found, CENTRED.relu(), CENTRED.relu() @ W_DEC + B_DEC)
    assert (found.hook, found.model) == (Hook(8), "EleutherAI/pythia-70m")


def test_dictionary_learning_topk(tmp_path: Path) -> None:
    more = {"encoder.bias": B_ENC, "b_dec": B_DEC, "k": torch.tensor(3),
            "threshold": torch.tensor(-1.0)}  # fmt: skip
    found = learnt(tmp_path, LINEAR | more, dict_class="AutoEncoderTopK", k=3)
    check(found, top(CENTRED, 3), top(CENTRED, 3) @ W_DEC + B_DEC)


def test_dictionary_learning_batch_topk_reads_as_its_threshold(tmp_path: Path) -> None:
    more = {"encoder.bias": B_ENC, "b_dec": B_DEC, "k": torch.tensor(3)}
    weights = LINEAR | more | {"threshold": torch.tensor(0.7)}
    found = learnt(tmp_path, weights, dict_class="BatchTopKSAE", k=3)
    latents = CENTRED.relu() * (CENTRED > 0.7)
    check(found, latents, latents @ W_DEC + B_DEC)
    with pytest.raises(UserError, match="no threshold yet"):
        learnt(tmp_path, weights | {"threshold": torch.tensor(-1.0)}, dict_class="BatchTopKSAE")


def test_dictionary_learning_multiplies_some_latents_by_lengths(tmp_path: Path) -> None:
    weights = STANDARD | {"threshold": THETA}
    jumped = PRE.relu() * (PRE > THETA)
    found = learnt(tmp_path / "jump", weights, dict_class="JumpReluAutoEncoder")
    check(found, jumped * NORMS, jumped @ W_DEC + B_DEC)
    r_mag, b_mag = draw(LATENTS, seed=5), draw(LATENTS, seed=6)
    gated = LINEAR | {"decoder_bias": B_DEC, "gate_bias": B_ENC, "r_mag": r_mag, "mag_bias": b_mag}
    magnitude = (r_mag.exp() * ((X - B_DEC) @ W_ENC) + b_mag).relu() * (CENTRED > 0)
    found = learnt(tmp_path / "gated", gated, dict_class="GatedAutoEncoder")
    check(found, magnitude * NORMS, magnitude @ W_DEC + B_DEC)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated", "mutual"])
def test_our_own_file_gives_the_same_bits(kind: str, tmp_path: Path, build: Any) -> None:
    built = build(kind)
    tensors = {name: one.float() for name, one in built.tensors().items()}
    about = {"metrics": {"l0": 3.0}}
    saved = Dictionary(kind, **tensors, k=built.k, centred=False, hook=Hook(2, "mlp_out"),
                       model="m", about=about)  # type: ignore[arg-type]  # fmt: skip
    save_dictionary(saved, tmp_path / "sae.safetensors")
    for place in (tmp_path, tmp_path / "sae.safetensors"):
        found = load_dictionary(place)
        assert all(torch.equal(one, tensors[name]) for name, one in found.tensors().items())
        plain = ("kind", "k", "centred", "hook", "model", "about")
        assert [getattr(found, name) for name in plain] == [getattr(saved, name) for name in plain]


class Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pwned"),))


def test_no_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {}}))
    for content in (Malicious(), {"encoder.weight": Malicious()}):
        torch.save(content, tmp_path / "ae.pt")
        with pytest.raises(UserError, match="something other than weights"):
            load_dictionary(tmp_path)
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UserError, match="something other than weights"):
        load_dictionary(tmp_path / "ae.pt")
    for name in ("sae.pkl", "model.pt", "weights.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(), protocol=2))
        with pytest.raises(UserError, match="is named as a pickle, which may run code"):
            load_dictionary(tmp_path / name)
    inside = tmp_path / "npz"
    inside.mkdir()
    np.savez(inside / "params.npz", W_enc=np.array([Malicious()], dtype=object))
    with pytest.raises(UserError, match="holds pickled objects"):
        load_dictionary(inside)
    assert not (tmp_path / "pwned").exists()


def saelens_with(tmp_path: Path, config: dict[str, Any], **weights: Tensor) -> Path:
    full = SAELENS | {"architecture": "standard"} | config
    return write(tmp_path, ("cfg.json", full), ("sae_weights.safetensors", STANDARD | weights))


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (tmp_path / "none", "no dictionary"),
        (saelens_with(tmp_path / "a", {"architecture": "transcoder"}), "unknown architecture"),
        (saelens_with(tmp_path / "b", {"normalize_activations": "layer_norm"}), "token by token"),
        (saelens_with(tmp_path / "c", {"normalize_activations": "expected_average_only_in"}),
         "scaled by a factor"),
        (saelens_with(tmp_path / "d", {}, W_enc=W_ENC.t()), r"w_enc has shape \[10, 6\]"),
        (saelens_with(tmp_path / "e", {}, scaling_factor=torch.full((10,), 2.0)),
         "scaling_factor"),
        (saelens_with(tmp_path / "f", {}, b_dec=torch.full((6,), torch.inf)), "NaN or infinite"),
        (saelens_with(tmp_path / "g", {"architecture": "topk"}), "k=None given"),
    ]  # fmt: skip
    (tmp_path / "a" / "notes.txt").write_text("hello")
    cases.append((tmp_path / "a" / "notes.txt", "no file of a known format"))
    bare = write(tmp_path / "h", None, ("sae_weights.safetensors", STANDARD))
    cases.append((bare, r"cfg.json' is missing"))
    cut = saelens_with(tmp_path / "i", {}) / "sae_weights.safetensors"
    cut.write_bytes(cut.read_bytes()[:-40])
    cases.append((cut, "cannot read"))
    empty = tmp_path / "j"
    empty.mkdir()
    cases.append((empty, r"no folder of a known format \(it holds nothing\)"))
    half = {name: one for name, one in STANDARD.items() if name != "b_enc"}
    gone = write(tmp_path / "k", None, ("params.npz", half))
    cases.append((gone, "has no 'b_enc'"))
    for place, message in cases:
        with pytest.raises(UserError, match=message) as told:
            load_dictionary(place)
        assert "\n" not in str(told.value)
        assert told.value.hint
