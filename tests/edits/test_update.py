"""An update is what an edit added, and can be added again."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from unlearn.curvature.direction import Direction
from unlearn.curvature.layers import find_layers
from unlearn.curvature.steps import Weights
from unlearn.edits.update import Update, is_start, load_update, reapply, save_update
from unlearn.errors import UserError
from unlearn.models import weights_hash


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
