"""Which layers are tracked, and which models and names are refused."""

import pytest
import torch

from unlearn.curvature.layers import find_layers
from unlearn.errors import UserError


def leaves(layers):
    return {layer.name.split(".", 3)[-1] for layer in layers}


MLP = {
    "llama": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}
ATTENTION = {
    "llama": {f"self_attn.{name}_proj" for name in "qkvo"},
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "neox": {"attention.query_key_value", "attention.dense"},
}


@pytest.mark.parametrize("kind", MLP)
def test_sets_of_layers(fresh_model, kind):
    model = fresh_model(kind)
    assert leaves(find_layers(model)) == MLP[kind]
    assert leaves(find_layers(model, "attention")) == ATTENTION[kind]
    assert leaves(find_layers(model, "all-linear")) == MLP[kind] | ATTENTION[kind]
    only = find_layers(model, blocks=(1, 1))
    assert all(".1." in layer.name for layer in only)
    assert len(only) == len(MLP[kind])


def test_weights_of_gpt2_are_seen_as_outputs_by_inputs(fresh_model):
    """c_attn makes 3 × 8 numbers of 8 and keeps them as [8, 24]."""
    (layer,) = find_layers(fresh_model("gpt2"), ["c_attn"], blocks=(0, 0))
    assert layer.module.weight.shape == (8, 24)
    assert layer.shape == (24, 8)
    assert layer.weight.data_ptr() == layer.module.weight.data_ptr()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["nothing"], "found in no layer's name"),
        (["down_proj", "input_layernorm"], "LlamaRMSNorm.*no linear layer"),
        (["embed_tokens"], "Embedding.*no linear layer"),
        (["lm_head"], "no linear layer inside a decoder layer"),
        ("mpl", "one of mlp, attention, all-linear"),
    ],
)
def test_names_that_cannot_be_tracked_are_refused(llama, layers, message):
    with pytest.raises(UserError, match=message) as caught:
        find_layers(llama, layers)
    assert "down_proj" in str(caught.value) or "mlp" in str(caught.value)


def test_blocks_that_are_not_there_are_refused(llama):
    with pytest.raises(UserError, match="the model has 2"):
        find_layers(llama, blocks=(0, 2))


def test_a_layer_called_twice_is_refused(llama):
    mlp = llama.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(forward(hidden))
    with pytest.raises(UserError, match="called 2 times per forward pass"):
        find_layers(llama)
    assert find_layers(llama, blocks=(0, 0))


def test_a_layer_that_is_never_called_is_refused(llama):
    llama.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(UserError, match="called never"):
        find_layers(llama)


def test_a_layer_that_sees_some_tokens_is_refused(llama):
    mlp = llama.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: torch.cat([forward(hidden[:, :2]), hidden[:, 2:]], 1)
    with pytest.raises(UserError, match="only part of the tokens"):
        find_layers(llama)


def test_weights_that_are_shared_are_refused(llama):
    first, second = (layer.mlp for layer in llama.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(UserError, match="shares its weight with"):
        find_layers(llama)
