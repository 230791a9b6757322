"""What leaves a layer, read with a forward pass that ends there."""

from typing import Any

import pytest
import torch

from unlearn.activations import check_layer, read_layer
from unlearn.errors import UserError
from unlearn.models import train_only
from unlearn.packing import packable

IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
BATCH = {
    "input_ids": IDS,
    "attention_mask": (IDS > 0).long(),
    "labels": torch.tensor([[-100, -100, 7, 8, 9], [-100, 6, 7, -100, -100]]),
}


def test_states_are_those_that_transformers_gives(build_tiny_model: Any) -> None:
    """``hidden_states[0]`` is the embedding, so layer k's output is ``hidden_states[k + 1]``."""
    model = build_tiny_model(num_hidden_layers=3)
    with torch.no_grad():
        theirs = model(**BATCH, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            ours = read_layer(model, {"forget": BATCH}, layer)["forget"]
            real = BATCH["attention_mask"].bool()
            torch.testing.assert_close(ours.hidden[real], theirs[layer + 1][real])
    assert torch.equal(ours.mask, BATCH["labels"] != -100)


def test_streams_of_different_width_and_packing_change_nothing(build_tiny_model: Any) -> None:
    model = build_tiny_model(num_hidden_layers=3)
    short = {name: part[:, :3] for name, part in BATCH.items()}
    with torch.no_grad():
        alone = read_layer(model, {"forget": short}, 1)["forget"]
        with packable(model):
            both = read_layer(model, {"retain": BATCH, "forget": short}, 1)["forget"]
    torch.testing.assert_close(both.hidden, alone.hidden)


def test_layers_above_are_not_run_and_come_back(build_tiny_model: Any) -> None:
    model = build_tiny_model(num_hidden_layers=3)
    ran = []
    for number, module in enumerate(model.model.layers):
        module.register_forward_hook(lambda *_, number=number: ran.append(number))
    before = model(**BATCH).logits
    ran.clear()
    read_layer(model, {"forget": BATCH}, 1)
    assert ran == [0, 1]
    assert torch.equal(model(**BATCH).logits, before)


def test_only_chosen_weights_get_a_gradient(build_tiny_model: Any) -> None:
    model = build_tiny_model(num_hidden_layers=3)
    train_only(model, [r"layers\.(0|1)\.mlp\.down_proj"])
    read_layer(model, {"forget": BATCH}, 1)["forget"].hidden.sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}


def test_mistakes_are_named(tiny_model: Any) -> None:
    check_layer(tiny_model, 1)
    with pytest.raises(UserError, match="layer=2 given, but the model has 2 layers"):
        check_layer(tiny_model, 2)
    with pytest.raises(UserError, match="'down_prj' is found in no weight's name"):
        train_only(tiny_model, ["down_prj"])
