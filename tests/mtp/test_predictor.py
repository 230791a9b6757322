"""Ordinary positions stay what they were; masks see their own prompt; unfit models are refused."""

from typing import Any

import pytest
import torch

from unlearn.errors import UserError
from unlearn.mtp.layout import Blocks, step_layout
from unlearn.mtp.passes import read_masks, read_text
from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import Shape


def one_pass(predictor: Any, ids: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Read text and all masks in a single forward pass, the text first."""
    n, number = len(ids), blocks.positions.numel()
    masks = predictor.masks[: blocks.k].repeat(len(blocks.anchors), 1)
    embedded = torch.cat([predictor.embed(ids), masks])
    positions = torch.cat([torch.arange(n), blocks.positions.flatten()])
    visible = torch.zeros(n + number, n + number, dtype=torch.bool)
    visible[:n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
    visible[n:] = blocks.visible()
    with predictor.gate.open(number):
        return predictor.read(embedded, positions, visible, None)


def some_blocks(n: int = 20, k: int = 3) -> tuple[torch.Tensor, Blocks]:
    ids = torch.randint(97, (n,), generator=torch.Generator().manual_seed(5))
    return ids, Blocks.at(torch.tensor([0, 4, 5, 17]), ids, ids, k)


def test_masks_of_many_blocks_are_what_each_prompt_alone_gives(predictor: Any) -> None:
    """First i tokens and k masks, i different prompts: the same hidden states to 1e-12."""
    ids, blocks = some_blocks()
    with torch.no_grad():
        found = one_pass(predictor, ids, blocks)[len(ids) :].view(4, 3, -1)
        for place, anchor in enumerate(blocks.anchors.tolist()):
            offsets, sees, which = step_layout(anchor + 1, ((anchor, 3),))
            embedded = torch.cat([predictor.embed(ids[: anchor + 1]), predictor.masks[which]])
            with predictor.gate.open(3):
                alone = predictor.read(embedded, offsets, sees, None)[anchor + 1 :]
            torch.testing.assert_close(found[place], alone, rtol=0, atol=1e-12)


def test_two_passes_read_what_one_pass_reads(predictor: Any) -> None:
    ids, blocks = some_blocks()
    with torch.no_grad(), predictor.gate.open(12):
        text = read_text_closed(predictor, ids)
        masks = read_masks(predictor, blocks, text.cache)
    whole = one_pass(predictor, ids, blocks).detach()
    torch.testing.assert_close(text.hidden, whole[:20], rtol=0, atol=1e-12)
    torch.testing.assert_close(masks.flatten(0, 1), whole[20:], rtol=0, atol=1e-12)


def read_text_closed(predictor: Any, ids: torch.Tensor) -> Any:
    with predictor.gate.open(0):
        return read_text(predictor, ids)


def test_ordinary_rows_are_equal_with_random_and_zero_lora(
    sharp_model: Any, build_predictor: Any
) -> None:
    """Not nearly: to the last bit, for passes of the same shape. The masks' own rows differ."""
    ids, blocks = some_blocks()
    found = []
    for random in (0.3, 0.0):
        predictor = build_predictor(sharp_model, random=random)
        predictor.masks.data = torch.ones_like(predictor.masks)
        with torch.no_grad():
            found.append(one_pass(predictor, ids, blocks))
        predictor.detach()
    assert torch.equal(found[0][:20], found[1][:20])
    assert not torch.allclose(found[0][20:], found[1][20:], atol=1e-3)


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_what_is_added_in_place_is_what_gradients_go_through(
    sharp_model: Any, build_predictor: Any, alpha: float | None
) -> None:
    predictor = build_predictor(sharp_model, alpha=alpha)
    offsets, sees, which = step_layout(4, ((1, 2), (3, 3)))
    embedded = torch.cat([predictor.embed(torch.tensor([5, 9, 2, 7])), predictor.masks[which]])
    found = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), predictor.gate.open(5):
            found.append(predictor.read(embedded, offsets, sees, None).detach())
    predictor.detach()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_the_model_is_left_as_it_was(build_sharp: Any) -> None:
    """Names, weights and outputs, with the predictor attached (its gate closed) and without."""
    model = build_sharp()
    ids = torch.arange(10)[None]
    before, weights = model(ids).logits, {n: w.clone() for n, w in model.state_dict().items()}
    predictor = MaskPredictor(model, Shape(k=2, rank=2))
    for parameter in predictor.trained().values():
        parameter.data += 1.0
    assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())
    predictor.detach()
    assert not any(module._forward_hooks for module in model.modules())


def test_eager_attention_gives_the_same(build_sharp: Any, build_predictor: Any) -> None:
    ids, blocks = some_blocks()
    found = []
    for kind in ("sdpa", "eager"):
        predictor = build_predictor(build_sharp(attn_implementation=kind))
        with torch.no_grad():
            found.append(one_pass(predictor, ids, blocks))
    # its softmax is computed in float32, whatever the model's precision is
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_residual_sampler_begins_as_the_base_head(sharp_model: Any) -> None:
    predictor = MaskPredictor(sharp_model, Shape(k=2, rank=2)).to(torch.float64)
    predictor.detach()
    hidden = torch.randn(5, 64, dtype=torch.float64)
    assert predictor.sampler is not None
    assert torch.equal(predictor.sampler(torch.randn_like(hidden), hidden), hidden)


def test_paper_sampler_begins_with_the_size_of_hidden_states(sharp_model: Any) -> None:
    """Its last LayerNorm has unit spread times the gain: the root mean square of the text's own."""
    predictor = MaskPredictor(sharp_model, Shape(k=2, rank=2, sampler="paper")).to(torch.float64)
    predictor.detach()
    ids = torch.arange(6)
    text = read_text(predictor, ids)
    assert predictor.sampler is not None
    out = predictor.sampler(predictor.embed(ids), text.hidden)
    assert out.square().mean().sqrt().item() == pytest.approx(
        text.hidden.square().mean().sqrt().item(), rel=1e-3
    )


def test_a_shortlist_of_all_but_some_tokens_chooses_the_same(predictor: Any) -> None:
    """Where the sampler's choice is among the base's 20 likeliest, as for small moves it is."""
    hidden = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for parameter in predictor.sampler.parameters():
        parameter.data *= 0.01
    with torch.no_grad():
        whole = predictor.draft(torch.tensor(5), hidden)
        short = predictor.draft(torch.tensor(5), hidden, shortlist=20)
    assert torch.equal(whole, short)


def refused(model: Any) -> str:
    with pytest.raises(UserError) as error:
        MaskPredictor(model, Shape(k=2, rank=2))
    return str(error.value)


def test_models_that_cannot_be_exact_are_refused() -> None:
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        MambaConfig,
        MistralConfig,
        Qwen3NextConfig,
    )

    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    sliding = AutoModelForCausalLM.from_config(MistralConfig(**small, sliding_window=4))
    assert "sliding-window attention in layer 0" in refused(sliding)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert "linear attention" in refused(mamba) or "key-value cache" in refused(mamba)
    mixed = AutoModelForCausalLM.from_config(
        Qwen3NextConfig(**small, num_experts=2, num_experts_per_tok=1, head_dim=8,
                        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                        linear_value_head_dim=8, moe_intermediate_size=8,
                        shared_expert_intermediate_size=8,
                        layer_types=["linear_attention", "full_attention"])
    )  # fmt: skip
    assert "linear attention in layer 0" in refused(mixed)
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )
    assert "no linear layers" in refused(gpt2)


def test_attention_without_masks_and_unknown_targets_are_refused(build_sharp: Any) -> None:
    model = build_sharp()
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        MaskPredictor(model, Shape(k=2, rank=2, targets="q_prj"))
    model.config._attn_implementation = "flash_attention_2"
    assert "attention of kind 'flash_attention_2'" in refused(model)


def test_a_model_whose_logits_change_is_refused(build_sharp: Any, monkeypatch: Any) -> None:
    """Something done after the head that nothing in the configuration tells of."""
    model = build_sharp()
    forward = type(model).forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found.logits = found.logits * 2
        return found

    monkeypatch.setattr(type(model), "forward", other)
    assert "gives other logits when masks follow a text" in refused(model)
