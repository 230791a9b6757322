"""Task vectors by hand, with all weights and with adapters."""

import copy

import pytest
import torch

from unlearn.edits import EDITS, check_hyper, find
from unlearn.edits.task_vector import task_vector
from unlearn.errors import UserError
from unlearn.models import Lora, add_lora

IDS = torch.arange(3, 12)[None]


def test_the_step_is_taken_back_scale_times():
    """From 2 to 3 is +1; twice that taken from 2 is 0. A bias that stayed stays."""
    model, tuned = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for one, weight in ((model, 2.0), (tuned, 3.0)):
        torch.nn.init.constant_(one.weight, weight)
        torch.nn.init.constant_(one.bias, 7.0)
    edited = task_vector(model, tuned, scale=2.0)
    assert edited is model
    assert edited.weight.item() == 0.0
    assert edited.bias.item() == 7.0


def test_bfloat16_weights_are_changed_in_float32():
    """1 - 5 * (1.0078125 - 1) = 0.9609375, which bfloat16 holds; each product would be rounded."""
    model, tuned = torch.nn.Linear(1, 1).bfloat16(), torch.nn.Linear(1, 1).bfloat16()
    torch.nn.init.constant_(model.weight, 1.0)
    torch.nn.init.constant_(tuned.weight, 1.0078125)
    assert task_vector(model, tuned, scale=5.0).weight.item() == 0.9609375


def test_adapters_give_what_all_weights_would(build_tiny_model):
    adapted = add_lora(build_tiny_model(), Lora(rank=2, alpha=4.0))
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    tuned = copy.deepcopy(adapted).merge_and_unload()
    whole = task_vector(build_tiny_model(), tuned, scale=3.0)
    edited = task_vector(adapted.get_base_model(), adapted, scale=3.0).merge_and_unload()
    torch.testing.assert_close(edited(IDS).logits, whole(IDS).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(edited(IDS).logits, build_tiny_model()(IDS).logits, atol=1e-2)


def test_tied_weights_are_changed_once(build_tiny_model):
    model = build_tiny_model(tie_word_embeddings=True)
    tuned = build_tiny_model(seed=1, tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    expected = before - 2.0 * (tuned.lm_head.weight - before)
    task_vector(model, tuned, scale=2.0)
    torch.testing.assert_close(model.model.embed_tokens.weight, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_table_says_what_an_edit_asks_for():
    edit = find("task_vector")
    assert EDITS["task_vector"] is edit
    assert edit.hyper == {"scale": 5.0}
    assert edit.asks("tuned")
    assert not edit.asks("data")
    assert check_hyper("task_vector", {"scale": 1.0}) == []
    assert "greater than 0" in check_hyper("task_vector", {"scale": -1.0})[0]
    assert "did you mean 'scale'" in check_hyper("task_vector", {"scal": 1.0})[0]
    with pytest.raises(UserError, match="did you mean 'task_vector'"):
        find("task_vectr")
