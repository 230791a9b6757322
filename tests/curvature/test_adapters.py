"""Adapters: their two matrices have Kronecker factors and gradients like any linear layer."""

import pytest
import torch

from unlearn.curvature.adapters import Adapter
from unlearn.curvature.damping import Damping
from unlearn.curvature.direction import direction
from unlearn.curvature.fit import FitSettings, fit_curvature, gradient
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.edits.adapters import added_below
from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.models import Lora, add_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors", "ignore:.*fan_in")
LORA = Lora(rank=3, alpha=6.0)


def adapted(model, *, moved=True, lora=LORA):
    """Put adapters on a model; with ``moved``, B is no longer 0."""
    model = add_lora(model, lora).double()
    if moved:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, one in model.named_parameters():
                if ".lora_B." in name:
                    one.normal_(std=0.3)
    return model


def layers_of(model):
    """Give (name, adapter) of every adapted layer."""
    found = ((n, m) for n, m in plain(model).named_modules() if getattr(m, "lora_A", None))
    return [(name, Adapter.on(module)) for name, module in found]


def test_factors_are_those_of_two_linear_layers(any_model, rows, naive):
    """A: the layer's inputs and the gradient at Ax; B: Ax and s times the gradient at the output.

    The naive ones come from hooks, row by row. Layers with the same input share A's input factor.
    """
    model = adapted(any_model)
    layers = find_layers(model, "all-linear")
    expected = naive(model, layers, rows, None)
    found = fit_curvature(
        model, Rows(rows, batch_tokens=20), layers, FitSettings("kfac", "empirical")
    )
    assert len(layers) == 2 * len(layers_of(model))
    for layer in layers:
        inputs, outputs, _ = expected[layer.name]
        block = found.layers[layer.name]
        torch.testing.assert_close(block.inputs.parts[0], inputs)
        torch.testing.assert_close(block.outputs.parts[0], outputs)


def test_layers_that_read_the_same_share_a_factor_of_a_alone(llama):
    """In float32 adapters on a bfloat16 model, too, whose inputs are copies of one tensor."""
    model = add_lora(llama.bfloat16(), LORA)
    layers = {layer.name: layer for layer in find_layers(model, "all-linear")}
    gate, up, down = (f"model.layers.0.mlp.{name}_proj.lora_" for name in ("gate", "up", "down"))
    assert layers[f"{up}A.default"].weight.dtype == torch.float32
    assert layers[f"{up}A.default"].group == f"{gate}A.default"
    assert layers[f"{down}A.default"].group == f"{down}A.default"
    assert all(one.group == name for name, one in layers.items() if ".lora_B." in name)


def test_gradients_follow_from_that_of_the_whole_weight(fresh_model, rows):
    """W' = W + sBA, so dL/dB = s·G Aᵀ and dL/dA = s·Bᵀ G, where G = dL/dW' of the merged model."""
    model = adapted(fresh_model())
    found = gradient(model, Rows(rows), find_layers(model, "all-linear")).weights
    merged = adapted(fresh_model()).merge_and_unload()
    whole = gradient(merged, Rows(rows), find_layers(merged, "all-linear")).weights
    for name, one in layers_of(model):
        down, up, there = one.down.weight, one.up.weight, whole[name]
        torch.testing.assert_close(
            found[f"{name}.lora_B.default"], one.scale * there @ down.t().detach()
        )
        torch.testing.assert_close(
            found[f"{name}.lora_A.default"], one.scale * up.t().detach() @ there
        )


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "tkfac", "act", "diag"])
def test_while_b_is_zero_a_has_no_step_and_nothing_is_warned_of(llama, rows, kind, recwarn):
    model = adapted(llama, moved=False)
    layers = find_layers(model, "all-linear")
    curvature = fit_curvature(model, Rows(rows), layers, FitSettings(kind))
    step = direction(curvature, gradient(model, Rows(rows), layers), Damping("factored", 1e-3))
    assert step.slope > 0
    assert all(one.isfinite().all() for one in step.weights.values())
    for name, one in step.weights.items():
        assert bool(one.any()) == (".lora_B." in name)
    assert all(".lora_B." in name and amount > 0 for name, amount in step.dampings.items())
    assert not [w for w in recwarn if "curvature at all" in str(w.message)]


def test_what_is_added_below_is_what_merging_adds(any_model, fresh_model, request):
    """In GPT-2's layout, too: weights as [in, out]."""
    kind = request.node.callspec.params["any_model"]
    model = adapted(any_model)
    found = added_below(model, find_layers(model, "mlp"))
    added = found["weights"]
    merged = adapted(fresh_model(kind)).merge_and_unload()
    start = dict(fresh_model(kind).named_parameters())
    assert set(added) == {f"{name}.weight" for name, _ in layers_of(model) if ".mlp." in name}
    assert {min(one.left.shape) for one in added.kept.values()} == {3}
    for name, change in added.items():
        torch.testing.assert_close(dict(merged.named_parameters())[name], start[name] + change)
    assert found["changed_share"] == pytest.approx(1.0, abs=0.01)
    assert found["rounding"] < 1e-12
    assert added_below(merged, find_layers(merged)) is None


def test_rounding_below_adapters_is_that_of_the_weights(llama):
    """Adapters in float32 lose nothing themselves; merged into bfloat16 most of it is lost."""
    model = add_lora(llama.bfloat16(), LORA)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if ".lora_B." in name:
                one.fill_(1e-6)
    found = added_below(model, find_layers(model))
    assert found["changed_share"] < 0.1
    assert found["rounding"] > 0.5


@pytest.mark.parametrize(
    ("layers", "message"),
    [("attention", "no adapter lies on"), (["down_proj", "q_proj"], "'q_proj': no adapter")],
)
def test_a_filter_without_adapted_layers_is_refused(llama, layers, message):
    model = add_lora(llama, Lora(rank=2, targets=("down_proj", "up_proj")))
    with pytest.raises(UserError, match=f"{message}.*on: down_proj, up_proj"):
        find_layers(model, layers)
    assert len(find_layers(model, ["down_proj"], blocks=(1, 1))) == 2


def test_adapters_of_other_kinds_are_refused(fresh_model):
    from peft import LoraConfig, get_peft_model

    for more in ({"use_dora": True}, {"lora_bias": True}):
        config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", **more)
        with pytest.raises(UserError, match="several, or no plain LoRA"):
            find_layers(get_peft_model(fresh_model(), config))
    two = add_lora(fresh_model(), LORA)
    two.add_adapter("other", two.peft_config["default"])
    with pytest.raises(UserError, match="several"):
        find_layers(two)
    inside = plain(add_lora(fresh_model(), LORA))
    with pytest.raises(UserError, match="merge them first"):
        find_layers(inside)
