"""Written as SAELens writes it, and read back: the same latents, the same place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unlearn.errors import UserError
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.export import export
from unlearn.sae.hook import Hook
from unlearn.sae.storage import load_dictionary

KEYS = {
    "relu": {"W_enc", "b_enc", "W_dec", "b_dec"},
    "topk": {"W_enc", "b_enc", "W_dec", "b_dec"},
    "jumprelu": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
    "gated": {"W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
}


def plain(built: Dictionary, kind: Any, **more: Any) -> Dictionary:
    tensors = {name: one.float() for name, one in built.tensors().items()}
    return Dictionary(kind, **tensors, k=built.k, **more)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated", "batchtopk", "feature"])
def test_what_is_written_reads_back_the_same(
    kind: str, centred: bool, tmp_path: Path, build: Any
) -> None:
    """Bit for bit; the kinds that choose among a batch come back as jumprelu."""
    given = plain(build(kind), kind, centred=centred, hook=Hook(7, "resid_pre"), model="m")
    export(given, tmp_path / "out")
    found = load_dictionary(tmp_path / "out")
    x = torch.randn(40, given.width, generator=torch.Generator().manual_seed(1))
    assert 0 < float((given.encode(x) > 0).float().mean()) < 1
    assert torch.equal(found.encode(x), given.encode(x))
    assert torch.equal(found.reconstruct(x), given.reconstruct(x))
    assert found.kind == (kind if kind in KEYS else "jumprelu")
    assert (found.hook, found.model, found.k) == (given.hook, "m", given.k)
    assert load_file(tmp_path / "out/sae_weights.safetensors").keys() == KEYS[found.kind]


def test_the_configuration_is_that_of_version_6(tmp_path: Path, build: Any) -> None:
    """Keys and words of SAELens 6; a file without a version it takes for an older one."""
    about = {"settings": {"context": 128}}
    given = plain(build("topk"), "topk", hook=Hook(2), model="org/name", about=about)
    told = export(given, tmp_path / "out")
    assert json.loads((tmp_path / "out/cfg.json").read_text()) == told == {
        "architecture": "topk", "d_in": 5, "d_sae": 11, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", "k": 3, "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None,
                     "hook_name": "blocks.2.hook_resid_post", "model_name": "org/name",
                     "context_size": 128},
    }  # fmt: skip
    heads = plain(build("relu"), "relu", hook=Hook(2, "attn_z"))
    assert export(heads, tmp_path / "heads")["reshape_activations"] == "hook_z"


def test_what_cannot_be_written_is_refused(tmp_path: Path, build: Any) -> None:
    given = plain(build("mutual"), "mutual")
    bare = Dictionary("mutual", given.w_enc, given.b_enc, given.w_dec, given.b_dec, k=3)
    with pytest.raises(UserError, match="this mutual dictionary has no threshold"):
        export(bare, tmp_path / "out")
    with pytest.raises(UserError, match="unknown format 'saelense'"):
        export(given, tmp_path / "out", form="saelense")
    assert not (tmp_path / "out").exists()
    export(given, tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        export(given, tmp_path / "out")
