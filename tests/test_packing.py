"""Packed forward passes: the same numbers and gradients as padded ones, or a refusal."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.packing import (
    NAME,
    SPARED,
    Packing,
    _begins,
    attention,
    can_pack,
    is_packable,
    packable,
    packed_forward,
)
from unlearn.scores import Scorer

SIZE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def right_padded(lengths: list[int], width: int | None = None) -> torch.Tensor:
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


def ids_for(attended: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, attended.shape, generator=generator)
    return ids.masked_fill(~attended, 0)


def build(name: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZE | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def test_layout_by_hand() -> None:
    """Rows of 1 and 3 tokens in width 4: the longer row (places 4, 5, 6) comes first."""
    packing = Packing.of(right_padded([1, 3], width=4))
    assert packing.places.tolist() == [4, 5, 6, 0]
    assert packing.positions.tolist() == [[0, 1, 2, 0]]
    assert [(group.rows, group.width) for group in packing.groups] == [(1, 3), (1, 1)]


def test_groups_are_cut_where_a_row_is_much_shorter_than_the_longest() -> None:
    """The cut is at 0.65 of the group's longest row: 7 of 10 stays, 6 of 10 does not."""
    packing = Packing.of(right_padded([6, 10, 3, 7]))
    assert [(group.rows, group.width) for group in packing.groups] == [(2, 10), (1, 6), (1, 3)]
    assert packing.groups[0].slots.tolist() == [*range(10), *range(10, 17)]


def test_a_group_must_spare_enough_where_attention_is_dear_to_start() -> None:
    """Beside 2000 tokens 3 rows of 100 spare 3 * (2000^2 - 100^2) = 11,970,000 query-key pairs."""
    lengths = [2000, 100, 100, 100]
    assert _begins(lengths, 0, 1, 11_970_000)
    assert not _begins(lengths, 0, 1, 11_970_001)
    assert not _begins([2000, 1500], 0, 1, 0)  # three quarters as long: padded in any case
    assert SPARED.get("cpu", 0) == 0


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_unpack_undoes_pack(lengths: list[int], extra: int) -> None:
    attended = right_padded(lengths, max(lengths) + extra)
    packing = Packing.of(attended)
    padded = torch.randn(*attended.shape, 3) * attended[..., None]
    packed = packing.pack(padded)
    assert packed.shape == (1, sum(lengths), 3)
    assert torch.equal(packing.unpack(packed), padded)
    assert torch.equal(packing.positions[0], packing.places % attended.shape[1])


def test_pack_and_unpack_have_the_gradients_of_their_values() -> None:
    packing = Packing.of(right_padded([2, 4, 1], width=5))
    padded = torch.randn(3, 5, 2, dtype=torch.double, requires_grad=True)
    packed = torch.randn(1, 7, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, (padded,))
    assert torch.autograd.gradcheck(packing.unpack, (packed,))
    group = packing.groups[0]
    tokens = torch.randn(len(group.slots), 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(group.unpack, (tokens,))


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_packed_equals_padded(name: str) -> None:
    """Logits at every real position and the gradient of every weight, for any lengths."""
    model = build(name).double()

    @given(st.lists(st.integers(1, 24), min_size=1, max_size=6), st.integers(0, 4))
    @settings(max_examples=15, deadline=None, derandomize=True)
    def check(lengths: list[int], extra: int) -> None:
        attended = right_padded(lengths, max(lengths) + extra)
        ids, packing = ids_for(attended), Packing.of(attended)
        weight = torch.randn(*attended.shape, 300, dtype=torch.double)
        found = []
        for packed in (False, True):
            model.zero_grad()
            if packed:
                with packable(model):
                    logits = packing.unpack(packed_forward(model, ids, packing).logits)
            else:
                logits = model(input_ids=ids, attention_mask=attended.long()).logits
            logits = logits * attended[..., None]
            (logits * weight).sum().backward()
            found.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)

    check()


def test_rows_do_not_see_each_other(build_tiny_model: Any) -> None:
    model = build_tiny_model()
    attended = right_padded([7, 5, 6])
    ids, packing = ids_for(attended), Packing.of(attended)
    changed = ids.clone()
    changed[0, 0] = 7 if ids[0, 0] != 7 else 8
    with packable(model), torch.no_grad():
        before = packing.unpack(packed_forward(model, ids, packing).logits)
        after = packing.unpack(packed_forward(model, changed, packing).logits)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_the_forward_pass_works_on_real_tokens_only(build_tiny_model: Any) -> None:
    model, seen = build_tiny_model(), []
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, out: seen.append(out.shape[:2]))
    attended = right_padded([9, 2, 3])
    labels = ids_for(attended).masked_fill(~attended, -100)
    batch = {"input_ids": ids_for(attended), "attention_mask": attended.long(), "labels": labels}
    scorer = Scorer.for_model(model, check=False)
    padded = scorer(model, batch).log_probs
    with packable(model):
        packed = scorer(model, batch).log_probs
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    assert seen == [(3, 9), (1, 14)]


def test_ordinary_passes_work_inside_the_block(build_tiny_model: Any) -> None:
    """Generation and left-padded batches go through the same model while it is packable."""
    model = build_tiny_model()
    attended = right_padded([4, 6]).flip(1)
    ids = ids_for(attended)
    masked = {"input_ids": ids, "attention_mask": attended.long()}
    greedy = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected = model(**masked).logits, model.generate(**masked, **greedy)
        with packable(model):
            got = model(**masked).logits, model.generate(**masked, **greedy)
    torch.testing.assert_close(got[0][attended], expected[0][attended])
    assert torch.equal(got[1], expected[1])


def test_the_block_gives_the_implementation_back(build_tiny_model: Any) -> None:
    model = build_tiny_model()

    def fail() -> None:
        with packable(model):
            assert is_packable(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not is_packable(model)
    assert model.config._attn_implementation == "sdpa"


PLAIN = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    "Granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "Gemma": {},
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_causal_attention_is_packed(name: str) -> None:
    model = build(name, **PLAIN[name])
    assert can_pack(model)
    assert not is_packable(model)


# Windows are longer than the rows `can_pack` tries, so that numbers alone would not tell.
NOT_PLAIN = {
    "sliding window": ("Mistral", {"sliding_window": 4096}),
    "some layers with a window": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1,
    }),
    "soft-capped attention": ("Gemma2", {
        "attn_logit_softcapping": 5.0, "layer_types": ["full_attention"] * 2,
    }),
    "windows and full attention in turn": ("Gemma2", {"sliding_window": 4096}),
    "eager attention": ("Llama", {"attn_implementation": "eager"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_other_attention_is_not_packed(kind: str) -> None:
    name, changes = NOT_PLAIN[kind]
    model = build(name, **changes)
    before = model.config._attn_implementation
    assert not can_pack(model)
    assert model.config._attn_implementation == before


def test_a_kind_of_layer_that_only_the_configuration_names_is_not_packed(tiny_model: Any) -> None:
    """Where the window is in the mask alone, short rows give the same numbers."""
    tiny_model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not can_pack(tiny_model)


@pytest.mark.parametrize("setting", ["softcap", "sliding_window", "s_aux", "position_bias"])
def test_what_a_packed_pass_would_ignore_is_refused(setting: str) -> None:
    packing = Packing.of(right_padded([2]))
    some = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=f"attention with {setting} cannot be packed"):
        attention(None, some, some, some, None, packing=packing, **{setting: 3})


def test_a_model_that_mixes_tokens_outside_attention_is_not_packed(build_tiny_model: Any) -> None:
    """The check compares numbers, so a mixing layer no configuration mentions is found too."""
    model = build_tiny_model()
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, inputs, output: output + output.roll(1, dims=1))
    assert not can_pack(model)


def test_an_adapter_does_not_hinder_packing(build_tiny_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build_tiny_model(), config)
    assert can_pack(model)
    with packable(model):
        assert model.config._attn_implementation == NAME
