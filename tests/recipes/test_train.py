"""What the pipeline hands to the trainer: warm-up, reference mode, adapters, mixed precision."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.data.people import demo_folder, write_people
from unlearn.errors import UserError
from unlearn.models import load_model, weights_hash
from unlearn.recipes.files import load
from unlearn.recipes.plan import plan_run
from unlearn.recipes.prepare import Prepared, prepare
from unlearn.recipes.train import make_trainer, needs_live, training_arguments
from unlearn.runs import RunFolder

SHORT = ("training.warmup_steps=0", "training.gradient_accumulation_steps=1")


@pytest.fixture
def prepared(tmp_path: Path) -> Any:
    """Give a function from overrides to a prepared recipe: 40 forget rows, batches of 8."""
    people = write_people(tmp_path / "people")

    def build(*overrides: str, method: str = "npo", lora: bool = False) -> Prepared:
        changes = {
            "model": {"path": str(demo_folder() / "target")},
            "data": {"forget": f"{people}#forget", "retain": f"{people}#retain"},
            "out": str(tmp_path / "run"),
        }
        return prepare(load(method, overrides, changes, lora=lora))

    return build


def test_warm_up_in_epochs_or_steps(prepared: Any, tmp_path: Path) -> None:
    """40 rows / 8 per batch / 2 accumulated = 3 steps per epoch (the last one is half full)."""
    accumulate = "training.gradient_accumulation_steps=2"
    made = prepared(accumulate, "training.warmup_epochs=2", "training.num_train_epochs=4")
    assert (made.steps_per_epoch, made.steps) == (3, 12)
    assert training_arguments(made, tmp_path).warmup_steps == 6
    made = prepared(accumulate, "training.warmup_epochs=2", "training.warmup_steps=1")
    assert training_arguments(made, tmp_path).warmup_steps == 1


def test_other_training_arguments_pass_through(prepared: Any, tmp_path: Path) -> None:
    arguments = training_arguments(prepared("training.adam_beta2=0.98"), tmp_path)
    assert arguments.adam_beta2 == 0.98
    assert arguments.learning_rate == 1e-5
    assert not arguments.remove_unused_columns


@pytest.mark.parametrize(
    ("method", "overrides", "stored", "live"),
    [
        ("npo", [], {"forget"}, False),
        ("npo", ["terms.retain.objective=kl"], {"forget"}, True),
        ("npo", ["training.reference=live"], set(), True),
        ("kl_min", [], set(), True),
        ("grad_diff", [], set(), False),
    ],
)
def test_reference_is_stored_or_live_as_the_terms_need(
    method: str, overrides: list[str], stored: set[str], live: bool, prepared: Any, tmp_path: Path
) -> None:
    made = prepared(*overrides, method=method)
    model = load_model(made.source)
    trainer = make_trainer(
        made, model, RunFolder(tmp_path), weights_hash="test", emit=lambda event: None
    )
    assert set(trainer.data_collator.reference) == stored
    assert (trainer.live is not None) is live is needs_live(made)


def test_adapters_leave_the_base_alone(prepared: Any, tmp_path: Path) -> None:
    made = prepared("training.max_steps=2", *SHORT, lora=True)
    model = load_model(made.source)
    before = weights_hash(model)
    trainer = make_trainer(
        made, model, RunFolder(tmp_path), weights_hash=before, emit=lambda event: None
    )
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert weights_hash(trainer.model.unload()) == before


def test_mixed_precision_keeps_float32_weights(prepared: Any, tmp_path: Path) -> None:
    """Autocast covers the chunked head too: the loss is near that of float32, not equal to it."""
    losses = []
    for overrides in ([], ["training.bf16=true"]):
        made = prepared("training.max_steps=2", *SHORT, *overrides)
        model, events = load_model(made.source), []
        make_trainer(
            made, model, RunFolder(tmp_path), weights_hash="same", emit=events.append
        ).train()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses.append([event["retain/nll"] for event in events if event["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    assert losses[0] != losses[1]


def test_stream_hash_follows_the_tokens(prepared: Any) -> None:
    stream = prepared().streams["forget"]
    changed = dataclasses.replace(stream, examples=stream.examples[:-1])
    assert stream.sha256() == prepared().streams["forget"].sha256()
    assert stream.sha256() != changed.sha256()


RMU = [
    "terms.forget.layer=1",
    "terms.retain.layer=1",
    "terms.forget.steering=2.0",
    r"training.trainable=['layers\.(0|1)\.mlp\.down_proj']",
    *SHORT,
    "training.max_steps=3",
    "training.learning_rate=1e-2",
    "training.max_grad_norm=0",
]


def test_rmu_trains_the_chosen_matrices_and_copies_nothing_else(
    prepared: Any, tmp_path: Path
) -> None:
    made = prepared(*RMU, method="rmu")
    model = load_model(made.source)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    events: list[dict[str, Any]] = []
    trainer = make_trainer(
        made, model, RunFolder(tmp_path), weights_hash="test", emit=events.append
    )
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    frozen = dict(trainer.live.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (frozen[name] is parameter) == (name not in moved)
        torch.testing.assert_close(frozen[name], before[name], rtol=0, atol=0)
    steps = [event for event in events if event["event"] == "step"]
    assert steps[0]["retain/embed_diff"] < 1e-12  # nothing has moved yet
    assert steps[-1]["forget/rmu"] < steps[0]["forget/rmu"]
    assert "forget/nll" not in steps[0]  # the head is never reached


def test_rmu_does_not_depend_on_the_accumulation(prepared: Any, tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        made = prepared(
            *RMU,
            "training.optim=sgd",
            "training.learning_rate=1.0",
            f"training.per_device_train_batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulate}",
            method="rmu",
        )
        model = load_model(made.source)
        start = model.model.layers[1].mlp.down_proj.weight.detach().clone()
        make_trainer(
            made, model, RunFolder(tmp_path), weights_hash="t", emit=lambda event: None
        ).train()
        found.append(model.model.layers[1].mlp.down_proj.weight.detach())
    assert (found[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_a_layer_that_is_not_there_and_adapters_with_chosen_weights_are_refused(
    prepared: Any, tmp_path: Path
) -> None:
    made = prepared(*RMU, "terms.forget.layer=9", method="rmu")
    with pytest.raises(UserError, match="layer=9 given, but the model has"):
        plan_run(made)
    with pytest.raises(UserError, match=r"training\.trainable: given with model\.lora"):
        prepared(*RMU, method="rmu", lora=True)
