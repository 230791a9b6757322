"""Training: drafts become right, a stop changes no bit, two ranks do what one does."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unlearn.data.encode import Example
from unlearn.errors import RunFailed, UserError
from unlearn.mtp.decode import Drafting, decode
from unlearn.mtp.layouts import LAYOUTS
from unlearn.mtp.predictor import MaskPredictor
from unlearn.mtp.settings import TrainSettings, require_share
from unlearn.mtp.train import Training, train_predictor

PROGRAM = Path(__file__).with_name("on_ranks.py")
HOW = TrainSettings(k=2, rank=3, steps=6, batch=4, anchors=6, lr=3e-3, held_out=3)


def program() -> Any:
    spec = importlib.util.spec_from_file_location("mtp_on_ranks", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drafts_become_right_and_the_text_stays(counting: Any) -> None:
    """Over four texts: hardly a draft is right before training; above 2 tokens per step after."""
    model, counted = counting
    rows = [Example(ids, ids, 0, at) for at, ids in enumerate(counted(20, n) for n in range(64))]
    how = TrainSettings(
        k=3, rank=8, steps=60, batch=8, anchors=12, lr=1e-2, labels="self", held_out=4
    )
    asked = torch.tensor([counted(4, seed) for seed in range(7, 11)])
    plain = model.generate(asked, do_sample=False, max_new_tokens=40, pad_token_id=0)[:, 4:]
    fresh = MaskPredictor(model, how.shape)
    before = [decode(fresh, prompt, max_new_tokens=40) for prompt in asked.tolist()]
    fresh.detach()
    assert [one.tokens for one in before] == plain.tolist()
    assert sum(one.steps for one in before) > 160 / 1.3
    trained = train_predictor(model, rows, how)
    assert trained.metrics["right"] > 0.7
    steps = {}
    for layout in LAYOUTS:
        found = [
            decode(trained.predictor, prompt, max_new_tokens=40, drafting=Drafting(layout))
            for prompt in asked.tolist()
        ]
        assert [one.tokens for one in found] == plain.tolist()
        steps[layout] = sum(one.steps for one in found)
    assert steps["quadratic"] < 160 / 2
    assert steps["quadratic"] <= steps["linear"]


def test_a_stop_changes_no_bit(tiny_model: Any, tmp_path: Path) -> None:
    rows, place, events = program().rows(), tmp_path / "training.safetensors", []
    how = replace(HOW, save_steps=2)
    whole = train_predictor(tiny_model, rows, how)
    whole.predictor.detach()
    first = Training(MaskPredictor(tiny_model, how.shape), rows, how, place)
    first.run(until=5)  # saved after step 4
    first.predictor.detach()
    resumed = train_predictor(tiny_model, rows, how, checkpoint=place, emit=events.append)
    assert events[0] == {"event": "resumed", "step": 4}
    assert resumed.metrics == whole.metrics
    for name, value in resumed.predictor.trained().items():
        assert torch.equal(value, whole.predictor.trained()[name]), name


def test_a_checkpoint_of_another_training_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    rows, place = program().rows(), tmp_path / "training.safetensors"
    how = replace(HOW, save_steps=2)
    Training(MaskPredictor(tiny_model, how.shape), rows, how, place).run(until=3)
    with pytest.raises(UserError, match=r"with lr 0\.003, not 0\.1"):
        train_predictor(tiny_model, rows, replace(how, lr=0.1), checkpoint=place)
    with pytest.raises(UserError, match="another rows"):
        train_predictor(tiny_model, rows[1:], how, checkpoint=place)


def test_computing_again_gives_the_same_predictor(tiny_model: Any) -> None:
    rows = program().rows()
    found = [
        train_predictor(tiny_model, rows, replace(HOW, gradient_checkpointing=on)).predictor
        for on in (False, True)
    ]
    for name, value in found[0].trained().items():
        torch.testing.assert_close(found[1].trained()[name], value, rtol=0, atol=1e-6, msg=name)


def test_two_ranks_do_what_one_does(tmp_path: Path, tiny_model: Any, on_two_ranks: Any) -> None:
    """Five sequences a step: three on the first rank, two on the second."""
    tiny_model.save_pretrained(tmp_path)
    on_two_ranks(PROGRAM, tmp_path)
    first, second = (load_file(tmp_path / f"rank-{rank}") for rank in range(2))
    for name, value in load_file(tmp_path / "alone").items():
        assert torch.equal(first[name], second[name]), name
        # Adam divides small gradients by their own size: their rounding is as large as they are
        torch.testing.assert_close(first[name], value, rtol=2e-3, atol=2e-4, msg=name)


def test_bfloat16_bases_are_trained_with_fp32_parts(tiny_model: Any) -> None:
    """The loss falls as far as the frozen head lets it; what is trained stays float32."""
    events: list[Any] = []
    model = tiny_model.bfloat16()
    how = replace(HOW, steps=12, anchors=20, lr=1e-2, held_out=0)
    rows = [Example([1, *[5, 6, 7, 8] * 4], [1, *[5, 6, 7, 8] * 4], 0, at) for at in range(8)]
    predictor = train_predictor(model, rows, how, emit=events.append).predictor
    losses = [event["mtp/base"] for event in events]
    assert losses[-1] < losses[0] - 0.05
    assert {value.dtype for value in predictor.trained().values()} == {torch.float32}
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=[])
    found = decode(predictor.to(torch.bfloat16), ids[0].tolist(), max_new_tokens=12)
    assert len(found.tokens) == plain.shape[1] - 4


def test_a_learning_rate_that_breaks_the_loss_ends_the_training(tiny_model: Any) -> None:
    predictor = MaskPredictor(tiny_model, HOW.shape)
    training = Training(predictor, program().rows(), HOW)
    predictor.masks.data.fill_(math.nan)
    with pytest.raises(RunFailed, match="the gradient of step 1 is not finite"):
        training.run()


def test_rows_that_no_mask_fits_are_refused(tiny_model: Any) -> None:
    short = [Example([5, 6], [5, 6], 0, 0), Example([5, 6, 7], [-100, -100, 7], 2, 1)]
    with pytest.raises(UserError, match="no row has three tokens"):
        train_predictor(tiny_model, short, HOW)


def test_fixed_mask_embeddings_stay(tiny_model: Any) -> None:
    predictor = MaskPredictor(tiny_model, HOW.shape, seed=0)
    before = predictor.masks.detach().clone()
    how = replace(HOW, train_mask_embeddings=False)
    Training(predictor, program().rows(), how).run()
    assert torch.equal(predictor.masks, before)


def test_the_learning_rate_rises_and_stays() -> None:
    """A tenth of 40 steps: 1/4, 2/4, 3/4, 4/4 of it, then all."""
    how = TrainSettings(steps=40, lr=1.0)
    assert [how.learning_rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert replace(how, warmup_steps=0).learning_rate(0) == 1.0


def rows_of(lengths: list[int]) -> list[Example]:
    return [Example([5] * one, [5] * one, 0, at) for at, one in enumerate(lengths)]


def test_nothing_is_changed_by_a_gradient_that_is_not_finite(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 has one: the run ends there, with the weights of step 2, and saves no more."""
    predictor = MaskPredictor(tiny_model, HOW.shape)
    training = Training(predictor, program().rows(), replace(HOW, max_grad_norm=0.0))
    training.run(until=2)
    before = {name: one.detach().clone() for name, one in predictor.trained().items()}
    backward = training.learner._backward

    def spoiled(*words: Any) -> Any:
        found = backward(*words)
        predictor.masks.grad[0, 0] = math.inf
        return found

    monkeypatch.setattr(training.learner, "_backward", spoiled)
    with pytest.raises(RunFailed, match="the gradient of step 3 is not finite"):
        training.run()
    assert all(torch.equal(before[name], one) for name, one in predictor.trained().items())


def test_weights_that_are_not_finite_are_not_kept(tiny_model: Any, tmp_path: Path) -> None:
    predictor = MaskPredictor(tiny_model, HOW.shape)
    training = Training(predictor, program().rows(), HOW, tmp_path / "kept.safetensors")
    predictor.masks.data[0, 0] = math.nan
    with pytest.raises(RunFailed, match="mask_embeddings is not finite after step 0"):
        training.save()
    assert not (tmp_path / "kept.safetensors").exists()


@pytest.mark.parametrize(
    ("lengths", "changes", "message"),
    [
        ([9] * 5, {"held_out": 5}, "held_out=5 given, but there are 5 texts"),
        ([9], {"held_out": 1}, "leave held_out out"),
        ([9, 129], {}, "a text has 129 tokens, but the model's context is 128"),
        ([9, 5], {"k": 8}, "set k to 7 or less"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    lengths: list[int], changes: Any, message: str, build_tiny_model: Any
) -> None:
    how = replace(HOW, **({"held_out": None} | changes))
    model = build_tiny_model(max_position_embeddings=128)
    with pytest.raises(UserError, match=message):
        train_predictor(model, rows_of(lengths), how)


def test_rows_are_held_out_as_asked_or_a_tenth(tiny_model: Any) -> None:
    for given, rows, held in [(3, 9, 3), (0, 9, 0), (None, 9, 0), (None, 40, 4), (None, 300, 16)]:
        predictor = MaskPredictor(tiny_model, HOW.shape)
        training = Training(predictor, rows_of([6] * rows), replace(HOW, held_out=given))
        assert (len(training.held_out), len(training.rows)) == (held, rows - held)
        predictor.detach()


@pytest.mark.parametrize("k", [0, 65, 1000])
def test_masks_without_measure_are_refused(k: int) -> None:
    with pytest.raises(UserError, match=f"k={k} masks asked for"):
        TrainSettings(k=k)


def test_more_processes_than_sequences_are_refused() -> None:
    require_share(HOW, 4)
    with pytest.raises(UserError, match="5 processes share 4 sequences"):
        require_share(HOW, 5)
