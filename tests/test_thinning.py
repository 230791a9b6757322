"""The last feed-forward block works on what is read, and nothing that is read changes."""

from typing import Any

import pytest
import torch
from torch import nn

from unlearn.packing import packable
from unlearn.scores import Scorer
from unlearn.thinning import last_feed_forward


def batch() -> dict[str, torch.Tensor]:
    """Give rows of 9, 5 and 12 tokens, the last 3, 1 and 7 of them labelled: 11 are read."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (3, 12), generator=generator)
    attended = torch.arange(12) < torch.tensor([[9], [5], [12]])
    labelled = attended & (torch.arange(12) >= torch.tensor([[6], [4], [5]]))
    labels = ids.masked_fill(~labelled, -100)
    return {"input_ids": ids, "attention_mask": attended.long(), "labels": labels}


def llama(build_tiny_model: Any) -> Any:
    return build_tiny_model()


def gpt2(build_tiny_model: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def mixture(build_tiny_model: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    config = MixtralConfig(vocab_size=300, sliding_window=None, **sizes, **heads)
    config._experts_implementation = "eager"  # the fast one knows no float64
    return MixtralForCausalLM(config).eval()


def adapted(build_tiny_model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(build_tiny_model(), config).eval()


def read(model: Any, scorer: Scorer, **want: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Give log-probabilities and the gradients of a weighted sum of them."""
    model.zero_grad()
    scores = scorer(model, batch(), **want)
    weights = torch.linspace(0.5, 2.0, scores.log_probs.numel()).view_as(scores.log_probs)
    (weights * scores.log_probs).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return scores.log_probs.detach(), grads


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("build", [llama, gpt2, mixture, adapted])
def test_values_and_gradients_are_those_of_all_positions(
    build: Any, packed: bool, build_tiny_model: Any
) -> None:
    model = build(build_tiny_model).double()
    scorer = Scorer.for_model(model)
    assert scorer.last_block is last_feed_forward(model)
    expected, gradients = read(model, Scorer(scorer.head))
    if packed and build is not gpt2:
        with packable(model):
            found, theirs = read(model, scorer)
    else:
        found, theirs = read(model, scorer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=0, atol=1e-11, msg=name)


def seen_by(model: Any, scorer: Scorer, **want: Any) -> list[int]:
    """Count the positions that reach the feed-forward block of every layer."""
    seen: list[int] = []
    handles = [
        layer.mlp.gate_proj.register_forward_hook(
            lambda module, inputs, output: seen.append(output[..., 0].numel())
        )
        for layer in model.model.layers
    ]
    scorer(model, batch(), **want)
    for handle in handles:
        handle.remove()
    return seen


def test_only_the_last_layer_skips_and_only_what_is_not_read(tiny_model: Any) -> None:
    """Of 36 positions 26 are real, 11 are read; who wants all logits reads every one."""
    scorer = Scorer.for_model(tiny_model)
    assert seen_by(tiny_model, scorer) == [36, 11]
    assert seen_by(tiny_model, scorer, want={"labelled", "statistics"}) == [36, 11]
    assert seen_by(tiny_model, scorer, want={"logits"}) == [36, 36]
    with packable(tiny_model):
        assert seen_by(tiny_model, scorer) == [26, 11]
    assert "forward" not in vars(last_feed_forward(tiny_model))


def test_layers_that_are_computed_again_skip_nothing(tiny_model: Any) -> None:
    scorer = Scorer.for_model(tiny_model)
    tiny_model.gradient_checkpointing_enable()
    assert seen_by(tiny_model, scorer) == [36, 36]


class Mixing(nn.Module):
    """A block in which a position sees the ones before it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.cumsum(1)


def test_a_block_that_mixes_positions_is_left_alone(tiny_model: Any) -> None:
    tiny_model.model.layers[-1].mlp = Mixing()
    assert Scorer.for_model(tiny_model).last_block is None


def test_a_block_of_another_name_is_left_alone(tiny_model: Any) -> None:
    tiny_model.model.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert last_feed_forward(tiny_model) is None
