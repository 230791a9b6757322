"""An update between two models leads from one to the other, bit for bit."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from unlearn.edits.difference import between, check_alike, described
from unlearn.edits.update import is_start, load_update, reapply, save_update
from unlearn.errors import UserError
from unlearn.models import Lora, add_lora, weights_hash

NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def gpt2():
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**size)).eval()


def moved(start, how):
    """Give a copy, changed as fine-tuning, as new weights, or by twelve orders of magnitude."""
    edited, draw = copy.deepcopy(start), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in edited.named_parameters():
            if ".mlp." not in name:
                continue
            noise = torch.randn(weight.shape, generator=draw)
            if how == "orders":
                powers = torch.randint(-40, 5, weight.shape, generator=draw)
                noise = noise * 2.0**powers
            weight.copy_(weight + 1e-3 * noise if how == "tuned" else noise)
    return edited


@pytest.mark.parametrize("how", ["tuned", "new", "orders"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_update_between_two_models_leads_from_one_to_the_other(
    build_tiny_model, tmp_path, dtype, how
):
    start = build_tiny_model().to(dtype)
    edited = moved(start, how)
    save_update(between(start, edited), tmp_path / "update.safetensors")
    update = load_update(tmp_path / "update.safetensors")
    assert len(update.weights) == 6
    assert is_start(start, update)
    assert weights_hash(reapply(copy.deepcopy(start), update, scale=1.0)) == weights_hash(edited)


def test_only_a_remainder_leads_to_a_weight_that_nearly_vanished(build_tiny_model):
    """In fp32, 1e-10 − 1 is −1, and 1 − 1 is 0."""
    start, edited = build_tiny_model(), build_tiny_model()
    start.state_dict()[NAME][0, 0], edited.state_dict()[NAME][0, 0] = 1.0, 1e-10
    update = between(start, edited)
    assert update.weights[NAME][0, 0] == -1.0
    assert update.remainders[NAME].values.tolist() == pytest.approx([1e-10])
    assert weights_hash(reapply(start, update, scale=1.0)) == weights_hash(edited)


def test_weights_that_stay_keep_even_the_sign_of_a_zero(build_tiny_model):
    start, edited = build_tiny_model(), build_tiny_model()
    for model in (start, edited):
        model.state_dict()[NAME][0, 0] = -0.0
    edited.state_dict()[NAME][0, 1] += 1.0
    update = between(start, edited)
    assert list(update.weights) == [NAME]
    assert weights_hash(reapply(start, update, scale=1.0)) == weights_hash(edited)


def test_it_is_described_in_norms_and_shares(build_tiny_model):
    """The norm layer's 32 ones become 1.5 in 8 places: ‖Δ‖ = √2, a quarter of √32."""
    start, edited = build_tiny_model(), build_tiny_model()
    edited.state_dict()[NORM][:8] += 0.5
    edited.state_dict()[NAME][0, 0] += 10.0
    found = described(start, edited, between(start, edited))
    assert [one["weight"] for one in found["layers"]] == [NAME, NORM]
    assert found["layers"][1] == {
        "weight": NORM,
        "shape": [32],
        "norm": pytest.approx(2**0.5),
        "relative": pytest.approx(0.25),
        "changed_share": 0.25,
    }
    whole = sum(float(one.detach().square().sum()) for one in start.parameters())
    assert found["norm"] == pytest.approx(102**0.5)
    assert found["relative"] == pytest.approx((102 / whole) ** 0.5)
    assert found["changed_share"] == found["changed_share_bfloat16"] == 9 / (32 + 48 * 32)


def test_models_that_no_update_leads_between_are_refused(build_tiny_model):
    start = build_tiny_model()
    broken = build_tiny_model()
    broken.state_dict()[NAME][0, 0] = float("nan")
    refused = {
        "the edited model a GPT2LMHeadModel": gpt2(),
        r"'.*proj.weight' is \[48, 32\] in the start, \[40, 32\] in": build_tiny_model(
            intermediate_size=40
        ),
        r"only the edited model has a weight 'model.layers.2": build_tiny_model(
            num_hidden_layers=3
        ),
        "a model has adapters": add_lora(build_tiny_model(), Lora(rank=2)),
        "has NaN or infinite": broken,
        "both models have the same weights": copy.deepcopy(start),
    }
    for message, edited in refused.items():
        with pytest.raises(UserError, match=message):
            between(start, edited)
    quantised = build_tiny_model()
    quantised.model.norm.weight = torch.nn.Parameter(
        torch.zeros(32, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UserError, match="is quantised"):
        check_alike(start, quantised)
