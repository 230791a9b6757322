"""Post-training in the trainer: what must not change the step does not change the weights."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.posttrain import trainers
from tests.posttrain.trainers import METHODS, flat, make_trainer, term, trained, weighted
from unlearn.data.encode import Example
from unlearn.errors import RunFailed
from unlearn.packing import can_pack, packable
from unlearn.posttrain.weights import sample_weights

EXACT = 1e-6
"""Models are in float64, but log-probabilities of norms are not: see tests/test_training.py."""


@pytest.fixture
def make(build_tiny_model: Any) -> Any:
    return lambda: build_tiny_model().double()


def assert_same(ours: Any, theirs: Any, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=tolerance)


def assert_moved(ours: Any, theirs: Any) -> None:
    assert float((flat(ours) - flat(theirs)).abs().max()) > 100 * EXACT


@pytest.mark.parametrize("method", ["redi", "dpo", "topr", "step", "cached", "sample"])
def test_accumulation_changes_nothing(method: str, make: Any, tmp_path: Path) -> None:
    """8 rows x 1 = 2 rows x 4, also for weights of the whole step, and the last, smaller step."""
    whole = trained(make(), tmp_path, METHODS[method])
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same(trained(make(), tmp_path, METHODS[method], **parts), whole)
    assert_moved(whole, make().state_dict())


def test_weights_of_a_pass_depend_on_the_pass(make: Any, tmp_path: Path) -> None:
    """So does the published method: that is what the scope ``step`` is for."""
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole = trained(make(), tmp_path, METHODS["micro"])
    assert_moved(trained(make(), tmp_path, METHODS["micro"], **parts), whole)
    assert_same(trained(make(), tmp_path, METHODS["step"]), whole)


@pytest.mark.parametrize("method", ["redi", "micro"])
def test_packed_equals_padded(method: str, make: Any, tmp_path: Path) -> None:
    """Rows laid end to end do not see each other."""
    padded = trained(make(), tmp_path, METHODS[method])
    model = make()
    assert can_pack(model)
    with packable(model):
        assert_same(trained(model, tmp_path, METHODS[method]), padded)


@pytest.mark.parametrize(
    "terms",
    [
        weighted("micro", "uniform"),
        weighted("step", warmup=1.0),
        weighted("micro", max_weight_ratio=1.0),
    ],
    ids=["uniform", "warm-up", "ratio 1"],
)
def test_switched_off_is_plain_training_bit_for_bit(terms: Any, make: Any, tmp_path: Path) -> None:
    assert_same(
        trained(make(), tmp_path, terms), trained(make(), tmp_path, METHODS["sft"]), tolerance=0.0
    )


def test_a_weighted_step_is_the_weighted_gradient(make: Any, tmp_path: Path) -> None:
    """Against sum w_i n_i l_i / sum w_i n_i with weights held fixed, from the model's own loss."""
    model, before = make(), make()
    trained(model, tmp_path, METHODS["micro"], max_steps=1)
    rows = trainers.STREAMS["text"]
    order = [at for _, at in make_trainer(make(), tmp_path, METHODS["sft"])._get_train_sampler()][
        :8
    ]

    def loss(row: Example) -> Any:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        return before(input_ids=ids, labels=labels).loss

    losses = torch.stack([loss(rows[at]) for at in order])
    weights = sample_weights(losses.detach(), max_weight_ratio=20.0)
    tokens = torch.tensor([len(rows[at].input_ids) - 3 for at in order], dtype=torch.float64)
    ((weights * tokens * losses).sum() / (weights * tokens).sum()).backward()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter -= 1e-2 * parameter.grad
    assert_same(model.state_dict(), before.state_dict())


def test_readings_tell_the_unweighted_loss_and_how_uneven_weights_are(
    make: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(make(), tmp_path, METHODS["step"], max_steps=1)
    trainer.train()
    plain = make_trainer(make(), tmp_path, METHODS["sft"], max_steps=1)
    plain.train()
    found = trainer.summary()
    assert found["text/nll"] == pytest.approx(plain.summary()["text/nll"], abs=1e-9)
    assert found["text/nll_reweighted"] > found["text/nll"]
    assert 1 / 8 < found["text/weight_ess"] < 1
    assert found["text/weight_max"] > 1


class Spoil(TrainerCallback):
    """Makes one number of the model no number, after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        given["model"].model.norm.weight.data[0] = math.nan


@pytest.mark.parametrize("method", ["micro", "step", "stream", "redi"])
def test_weights_of_rows_that_are_no_numbers_end_the_training(
    method: str, make: Any, tmp_path: Path
) -> None:
    """Losses of NaN give weights of NaN: the step is named and not taken."""
    trainer = make_trainer(make(), tmp_path, METHODS[method])
    trainer.add_callback(Spoil())
    before = trainer.model.lm_head.weight.clone()
    with pytest.raises(
        RunFailed, match=r"the gradient of step 2 is not finite: \S+ ?.*is no finite"
    ):
        trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.model.lm_head.weight.isfinite().all()
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_pairs_are_watched(make: Any, tmp_path: Path) -> None:
    """Margin is the difference of the terms' own means; entropy is at most that of all tokens."""
    trainer = make_trainer(make(), tmp_path, METHODS["redi"], max_steps=1)
    trainer.train()
    found = trainer.summary()
    margin = -found["chosen/answer_nll"] - found["rejected/answer_ascent"]
    assert found["pairs/margin"] == pytest.approx(margin)
    assert found["pairs/accuracy"] * 8 == pytest.approx(round(found["pairs/accuracy"] * 8))
    assert 0 < found["chosen/entropy"] <= math.log(300)


def test_the_sides_of_a_pair_need_not_share_a_pass(make: Any, tmp_path: Path) -> None:
    """Rejected answers in another order: within one step of all rows nothing changes."""
    steps = {"per_device_train_batch_size": 13, "max_steps": 1}
    whole = trained(make(), tmp_path, METHODS["redi"], **steps)
    trainer = make_trainer(make(), tmp_path, METHODS["redi"], **steps)
    rows = trainer.train_dataset.streams["rejected"]
    trainer.train_dataset.streams["rejected"] = rows[5:] + rows[:5]
    trainer.train()
    assert_same(trainer.model.state_dict(), whole)
    apart = trained(make(), tmp_path, (term("answer_nll", "chosen"),), **steps)
    assert_moved(apart, whole)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(make: Any, tmp_path: Path) -> None:
    """13 rows on two ranks with 4 at once: the second step has 4 rows on one and 1 on the other."""
    make().float().save_pretrained(tmp_path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.posttrain.trainers", str(tmp_path), str(rank)],
            cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    expected = {
        name: flat(trained(trainers.load(tmp_path), tmp_path, METHODS[name]))
        for name in trainers.ON_RANKS
    }
    expected["pruned"] = flat(trainers.pruned(trainers.load(tmp_path), tmp_path, 8))
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
    for rank in range(2):
        found = load_file(tmp_path / f"rank-{rank}")
        for name, weights in expected.items():
            torch.testing.assert_close(found[name], weights, rtol=0, atol=EXACT, msg=name)
        for name in trainers.APART:
            apart = found[f"{name} apart"]
            torch.testing.assert_close(apart, expected[name], rtol=0, atol=EXACT, msg=name)
