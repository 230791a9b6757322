"""Loading and saving: what is damaged is refused in one line, what is saved is the same model."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from unlearn import models
from unlearn.errors import UserError
from unlearn.models import (
    Lora,
    ModelSource,
    add_lora,
    check_safetensors,
    check_source,
    load_model,
    load_tokenizer,
    save_model,
    weights_hash,
)
from unlearn.runs import staged

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def saved(tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """Give a folder with a whole model, of this test alone."""
    folder = Path(tmp_path_factory.mktemp("model"))
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# Files


def test_a_whole_file_is_accepted(saved: Path, tmp_path: Path) -> None:
    check_safetensors(saved / "model.safetensors")
    for tensors in ({}, {"empty": torch.zeros(0, 3)}):
        (tmp_path / "small").write_bytes(save(tensors, metadata={"format": "pt"}))
        check_safetensors(tmp_path / "small")


def test_a_file_cut_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    path = tmp_path / "cut.safetensors"
    places = {0, 1, 7, 8, 9, 7 + header, 8 + header, 9 + header, len(whole) // 2, len(whole) - 1}
    for place in sorted(places | set(range(0, len(whole), len(whole) // 20))):
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match="is truncated"):
            check_safetensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="its header promises"):
        check_safetensors(path)


@given(
    header=st.one_of(
        st.binary(max_size=40),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5) | st.floats(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["a", "__metadata__", "data_offsets"]), inner, max_size=3
                )
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
@settings(max_examples=150, deadline=None)
def test_any_header_is_right_or_a_user_error(tmp_path_factory: Any, header: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with suppress(UserError):
        check_safetensors(path)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match="git-lfs pointer") as caught:
        check_safetensors(path)
    assert "git lfs pull" in caught.value.hint


# Folders


def test_what_is_no_model_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        check_source(ModelSource(str(tmp_path / "absent")))
    with pytest.raises(UserError, match="no model folder"):
        check_source(ModelSource("models/of/mine"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        check_source(ModelSource(str(tmp_path)))
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are never loaded"):
        check_source(ModelSource(str(saved)))


def test_a_hub_name_is_left_to_the_hub() -> None:
    check_source(ModelSource("owner/name"))
    with pytest.raises(UserError, match="cannot load the tokenizer of 'owner/name'"):
        load_tokenizer(ModelSource("owner/name", offline=True))


def test_quantising_needs_bitsandbytes(saved: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes") as caught:
        check_source(ModelSource(str(saved), quantize="nf4"))
    assert "pip install 'unlearn-llm[quant]'" in caught.value.hint


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_cut_file_is_one_line(name: str, saved: Path) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    load = load_tokenizer if name == "tokenizer.json" else load_model
    with pytest.raises(UserError) as caught:
        load(str(saved))
    assert str(saved) in caught.value.message
    assert "\n" not in caught.value.message


def test_weights_that_would_be_random_are_refused(saved: Path) -> None:
    """transformers fills in what a file lacks with random numbers and goes on."""
    path = saved / "model.safetensors"
    whole = load_file(path)
    lacking = {name: tensor for name, tensor in whole.items() if name != "model.norm.weight"}
    save_file(lacking, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing \(model\.norm\.weight\)"):
        load_model(str(saved))
    save_file(whole | {"model.norm.weight": torch.ones(7)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are of the wrong shape \(model\.norm\.weight"):
        load_model(str(saved))


def test_a_missing_part_of_the_weights_is_refused(saved: Path, tiny_model: Any) -> None:
    (saved / "model.safetensors").unlink()
    tiny_model.save_pretrained(saved, max_shard_size="50KB")
    parts = sorted(saved.glob("*.safetensors"))
    assert len(parts) > 1
    assert torch.equal(logits(load_model(str(saved))), logits(tiny_model))
    parts[-1].unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(saved))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_precision_is_the_one_asked_for(dtype: Any, expected: torch.dtype, saved: Path) -> None:
    if dtype == "auto" and torch.cuda.is_available():
        expected = torch.bfloat16
    model = load_model(ModelSource(str(saved), dtype=dtype), device="cpu")
    assert model.dtype == expected
    assert not model.training


# Adapters


def adapted(model: Any, **changes: Any) -> Any:
    """Give the model with adapters that are not zero."""
    torch.manual_seed(1)
    wrapped = add_lora(model, Lora(rank=4, alpha=8, **changes))
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if "lora_B" in name:
                tensor.normal_(0, 0.1)
    return wrapped


def test_only_adapters_of_the_targets_are_trainable(tiny_model: Any) -> None:
    wrapped = add_lora(tiny_model, Lora(rank=4, targets=("q_proj", "mlp.up_proj")))
    trainable = {name for name, tensor in wrapped.named_parameters() if tensor.requires_grad}
    assert len(trainable) == 2 * 2 * 2
    assert all("lora_" in name and ("q_proj" in name or "up_proj" in name) for name in trainable)


@pytest.mark.parametrize("targets", ["q_prj", ("q_prj",), ("k_proj", "q_prj")])
def test_a_target_that_is_not_there_is_refused_by_name(targets: Any, tiny_model: Any) -> None:
    """Also beside one that is there, where peft would train that one alone."""
    with pytest.raises(UserError, match="targets q_prj are not in this model") as caught:
        add_lora(tiny_model, Lora(targets=targets))
    assert "did you mean" in caught.value.message
    assert "down_proj, gate_proj, k_proj" in caught.value.hint


def test_adapters_are_merged_into_the_saved_model(
    saved: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The merged folder, and the adapter over the old weights, give the trained model's logits."""
    base = load_model(str(saved), device="cpu")
    untrained = logits(base)
    model = adapted(base)
    expected = logits(model)
    assert (expected - untrained).abs().max() > 0.01
    with staged(tmp_path / "model") as staging:
        save_model(model, tiny_tokenizer, staging, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    beside = load_model(str(tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(logits(beside), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_saved_files_can_be_read_by_others(
    lora: bool, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = adapted(tiny_model) if lora else tiny_model
    with staged(tmp_path / "model") as staging:
        save_model(model, tiny_tokenizer, staging, tmp_path / "adapter")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
    weights = {str(p.relative_to(tmp_path)) for p in files if p.suffix == ".safetensors"}
    adapter = {"adapter/adapter_model.safetensors"} if lora else set()
    assert weights == {"model/model.safetensors"} | adapter
    assert AutoTokenizer.from_pretrained(tmp_path / "model").vocab_size == 300


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_bit_by_bit(
    tied: bool, build_tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = build_tiny_model(tie_word_embeddings=tied)
    save_model(model, tiny_tokenizer, tmp_path, tmp_path / "adapter")
    again = load_model(str(tmp_path), device="cpu")
    assert weights_hash(again) == weights_hash(model)
    assert torch.equal(logits(again), logits(model))


def test_sampling_settings_without_sampling_do_not_prevent_saving(
    saved: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Some published models carry a temperature with do_sample=false; transformers 5.0 loads them
    and refuses to save them."""
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (saved / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(str(saved), device="cpu")
    assert model.generation_config.temperature is None
    save_model(model, tiny_tokenizer, tmp_path / "out", tmp_path / "adapter")
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert kept.eos_token_id == 2
    assert not kept.do_sample


def test_sampling_settings_of_a_model_that_samples_are_kept(saved: Path) -> None:
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (saved / "generation_config.json").write_text(json.dumps(settings))
    kept = load_model(str(saved), device="cpu").generation_config
    assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.6, 0.9)


# Identity


def test_the_hash_changes_with_one_bit(tiny_model: Any) -> None:
    before = weights_hash(tiny_model)
    tensor = tiny_model.model.layers[1].mlp.up_proj.weight.data
    bits = tensor.view(torch.int32)
    bits[3, 5] ^= 1
    assert weights_hash(tiny_model) != before
    bits[3, 5] ^= 1
    assert weights_hash(tiny_model) == before


def hash_of(**tensors: torch.Tensor) -> str:
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return weights_hash(module)


def test_the_hash_knows_names_shapes_and_types() -> None:
    numbers = torch.arange(6, dtype=torch.float32)
    hashes = {
        hash_of(a=numbers),
        hash_of(b=numbers),
        hash_of(a=numbers.view(2, 3)),
        hash_of(a=numbers.view(torch.int32)),
        hash_of(a=numbers, b=numbers),
        hash_of(a=numbers.view(2, 3).T),
    }
    assert len(hashes) == 6
    assert hash_of(a=numbers.view(2, 3).T) == hash_of(a=numbers.view(2, 3).T.contiguous())
    assert hash_of(b=numbers, a=-numbers) == hash_of(a=-numbers, b=numbers)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_scalars_and_empty_tensors_have_a_hash_too(dtype: torch.dtype) -> None:
    assert hash_of(a=torch.tensor(1, dtype=dtype)) != hash_of(a=torch.tensor(0, dtype=dtype))
    assert hash_of(a=torch.zeros(0, dtype=dtype)) == hash_of(a=torch.zeros(0, dtype=dtype))
