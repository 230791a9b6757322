"""An update is what an edit added, and can be added again."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from unlearn.curvature.direction import Direction
from unlearn.curvature.layers import find_layers
from unlearn.curvature.steps import Weights
from unlearn.edits.low_rank import truncated
from unlearn.edits.reapply import Added
from unlearn.edits.update import (
    Update,
    changed_share,
    check_fits,
    is_start,
    load_update,
    reapply,
    rounding,
    save_update,
    update_shapes,
)
from unlearn.errors import UserError
from unlearn.models import Lora, add_lora, weights_hash


def gpt2():
    torch.manual_seed(0)
    size = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**size)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_whole_update_on_the_start_is_the_edited_model(build_tiny_model, tmp_path, kind, dtype):
    """Also where weights are kept transposed; a quarter moves them by a quarter."""
    start = (build_tiny_model() if kind == "llama" else gpt2()).to(dtype)
    edited, draw = copy.deepcopy(start), torch.Generator().manual_seed(0)
    layers = find_layers(edited)
    weights = Weights(layers)
    for alpha in (0.3, 0.01):
        steps = {one.name: torch.randn(one.shape, generator=draw) for one in layers}
        weights.take(Direction(steps, 1.0, 1.0, {}), alpha)
    about = {"edit": "kfade", "start": weights_hash(start)}
    save_update(Update(weights.changes(), about), tmp_path / "update.safetensors")
    update = load_update(tmp_path / "update.safetensors")
    assert is_start(start, update)
    assert not is_start(edited, update)
    again = reapply(copy.deepcopy(start), update, scale=1.0)
    assert weights_hash(again) == weights_hash(edited)
    quarter = dict(reapply(copy.deepcopy(start), update, scale=0.25).named_parameters())
    for name, weight in start.named_parameters():
        expected = weight.float() + 0.25 * update.weights.get(name, torch.zeros(()))
        assert torch.equal(quarter[name], expected.to(dtype))


def test_a_model_of_another_shape_is_refused(build_tiny_model):
    name = "model.layers.0.mlp.up_proj.weight"
    update = Update({name: torch.zeros(48, 32)}, {})
    with pytest.raises(UserError, match=r"of shape \[48, 32\], which is \[40, 32\] here"):
        reapply(build_tiny_model(intermediate_size=40), update, scale=1.0)
    with pytest.raises(UserError, match="which this model does not have"):
        reapply(gpt2(), update, scale=1.0)
    with pytest.raises(UserError, match="give a finite number"):
        reapply(build_tiny_model(), update, scale=float("nan"))


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    for name, message in (("weights.safetensors", "holds no update"), ("gone", "cannot read")):
        with pytest.raises(UserError, match=message):
            load_update(tmp_path / name)


def test_a_scale_is_tried_without_a_trace(build_tiny_model):
    model = build_tiny_model()
    name = "model.layers.0.mlp.up_proj.weight"
    before, change = model.state_dict()[name].clone(), torch.randn(48, 32)
    before[0, 0] = model.state_dict()[name][0, 0] = -0.0
    added = Added(model, Update({name: change}, {}))
    for scale in (0.25, 16.0, 0.5):
        added.put(scale)
    assert torch.equal(model.state_dict()[name], before + 0.5 * change)
    added.put(0.0)
    assert weights_hash(model) == weights_hash(build_with(build_tiny_model(), name, before))


def build_with(model, name, values):
    model.state_dict()[name].copy_(values)
    return model


def test_low_rank_is_the_nearest_of_its_rank_and_comes_back_from_a_file(tmp_path):
    """diag(3, 2, 1) in rank 2: what is lost is 1 of √(9 + 4 + 1)."""
    change = torch.zeros(8, 9)
    change[range(3), range(3)] = torch.tensor([3.0, 2.0, 1.0])
    update = Update({"a": change, "bias": torch.ones(3)}, {"edit": "kfade"}).of_rank(2)
    assert update.about["relative_error"] == pytest.approx((1 / 17) ** 0.5)
    expected = change.clone()
    expected[2, 2] = 0.0
    save_update(update, tmp_path / "update.safetensors")
    for found in (update, load_update(tmp_path / "update.safetensors")):
        assert dict(found.about) == update.about
        torch.testing.assert_close(found.weights["a"], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.weights["bias"], torch.ones(3))
        assert found.kept["a"].left.shape == (8, 2)
    shapes = update_shapes(tmp_path / "update.safetensors")
    assert shapes == {"a": [8, 9], "bias": [3]}


def test_factors_are_balanced_and_matrices_that_gain_nothing_stay_whole():
    draw = torch.Generator().manual_seed(0)
    wide, small = torch.randn(12, 20, generator=draw), torch.randn(4, 4, generator=draw)
    kept, error = truncated({"wide": wide, "small": small}, 5)
    values = torch.linalg.svdvals(wide)
    left, right = kept.kept["wide"].left, kept.kept["wide"].right
    torch.testing.assert_close((left.T @ left).diag(), values[:5])
    torch.testing.assert_close((right @ right.T).diag(), values[:5])
    assert torch.equal(kept["small"], small)
    whole = (wide.square().sum() + small.square().sum()).sqrt()
    assert error == pytest.approx(float(values[5:].square().sum().sqrt() / whole), rel=1e-4)


def test_a_low_rank_update_at_another_length_adds_what_it_says(build_tiny_model):
    """Bit for bit: what a run stores of a reapplied update leads to the run's own model."""
    name, draw = "model.layers.0.mlp.up_proj.weight", torch.Generator().manual_seed(0)
    update = Update({name: torch.randn(48, 32, generator=draw)}, {}).of_rank(3)
    found = [
        reapply(build_tiny_model(), one, scale=scale)
        for one, scale in ((update, 0.3), (update.scaled(0.3), 1.0))
    ]
    assert weights_hash(found[0]) == weights_hash(found[1]) != weights_hash(build_tiny_model())


def test_shares_and_rounding_by_hand():
    """In bf16, 1 + 2⁻⁹ is rounded back to 1, and 1 + 2⁻⁷ is exact."""
    start = {"a": torch.ones(4, dtype=torch.bfloat16)}
    added = {"a": torch.tensor([0.0, 2.0**-9, 2.0**-7, 2.0**-7])}
    edited = {"a": (start["a"].float() + added["a"]).bfloat16()}
    assert changed_share(start, edited) == 0.5
    lost = 2.0**-18 / (2.0**-18 + 2 * 2.0**-14)
    assert rounding(start, edited, added) == pytest.approx(lost**0.5)
    exact = {"a": start["a"].float() + added["a"]}
    assert rounding(start, exact, added) == 0.0


def test_adapters_are_refused(build_tiny_model):
    adapted = add_lora(build_tiny_model(), Lora(rank=2))
    with pytest.raises(UserError, match="the model has adapters"):
        check_fits(adapted, {})
