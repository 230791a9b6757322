"""Rows left out of epochs: how many, which, how much the others count, and after a stop."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.posttrain.trainers import METHODS, flat, make_trainer
from unlearn.posttrain.pruning import PrunedSampler, Pruner, Pruning

INFO = Pruning("infobatch", keep=0.5, easy=0.5)
SETA = Pruning("seta", keep=1.0, groups=10, window=0.5)


@pytest.mark.parametrize("how", [INFO, SETA, Pruning("seta", keep=0.7, groups=3, window=0.9)])
def test_as_many_rows_are_chosen_as_were_announced(how: Pruning) -> None:
    for size in (1, 2, 13, 100):
        losses = torch.rand(size, generator=torch.Generator().manual_seed(size))
        for epoch in range(10):
            rows, weights = how.choose(losses, epoch, 10, seed=3)
            assert len(rows) == len(weights) == len(set(rows)) == how.rows(epoch, 10, size)


def test_infobatch_thins_out_the_easy_half() -> None:
    """Losses 0 … 99: 25 of the first 50 stay and count twice; all of the others, once."""
    rows, weights = INFO.choose(torch.arange(100.0), 1, 8, seed=0)
    easy = [weight for row, weight in zip(rows, weights, strict=True) if row < 50]
    assert easy == [2.0] * 25
    assert sorted(row for row in rows if row >= 50) == list(range(50, 100))
    assert set(weights) == {1.0, 2.0}
    for epoch in (0, 7):  # nothing is known yet; the last epochs have all rows
        assert sorted(INFO.choose(torch.arange(100.0), epoch, 8, seed=0)[0]) == list(range(100))


def test_infobatch_keeps_the_expected_sum() -> None:
    """Over 400 seeds the mean of the weighted sums is the sum of all, within 4 standard errors."""
    losses = torch.rand(40, generator=torch.Generator().manual_seed(1))
    sums = []
    for seed in range(400):
        rows, weights = Pruning(keep=0.3).choose(losses, 1, 8, seed)
        sums.append(sum(float(losses[r]) * w for r, w in zip(rows, weights, strict=True)))
    mean = sum(sums) / len(sums)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in sums) / (len(sums) - 1))
    assert deviation > 0
    assert abs(mean - float(losses.sum())) < 4 * deviation / math.sqrt(len(sums))


def test_setas_window_moves_from_easy_to_hard_and_begins_again() -> None:
    """Ten groups, windows of five: 0 (all), 1, 2, 3, 4, 5, 0, 1; then all rows again."""
    assert [SETA.window_start(epoch) for epoch in range(8)] == [0, 1, 2, 3, 4, 5, 0, 1]
    losses = torch.arange(100.0).flip(0)
    for epoch, low in ((1, 10), (5, 50), (6, 0)):
        rows, weights = SETA.choose(losses, epoch, 8, seed=0)
        assert sorted(float(losses[row]) for row in rows) == list(range(low, low + 50))
        assert set(weights) == {1.0}
    assert len(SETA.choose(losses, 0, 8, seed=0)[0]) == 100
    assert len(SETA.choose(losses, 7, 8, seed=0)[0]) == 100


def test_choices_are_functions_of_seed_and_epoch() -> None:
    losses = torch.arange(50.0)
    one = INFO.choose(losses, 2, 8, seed=4)
    assert INFO.choose(losses, 2, 8, seed=4) == one
    assert INFO.choose(losses, 2, 8, seed=5) != one
    assert INFO.choose(losses, 3, 8, seed=4) != one


def test_the_sampler_gives_all_epochs_and_fills_up() -> None:
    """13 rows, 4 epochs: 13 + 10 + 10 + 10 = 43, and 5 empty rows for batches of 8."""
    pruner = Pruner(Pruning("infobatch", 0.5, 0.5), 13, 4, seed=0)
    sampler = PrunedSampler(pruner, multiple=8)
    keys = list(sampler)
    assert pruner.visits == 43
    assert len(keys) == len(sampler) == 48
    assert [sum(key[0] == epoch for key in keys) for epoch in range(4)] == [13, 10, 10, 10]
    assert [key[1] for key in keys[-5:]] == [-1] * 5


def pruned(model: Any, folder: Path, **changes: Any) -> Any:
    return make_trainer(
        model, folder, METHODS["sft"], per_device_train_batch_size=4, num_train_epochs=1,
        pruner=Pruner(Pruning("infobatch", 0.5, 0.5), 13, 4, seed=2), **changes,
    )  # fmt: skip


def test_a_training_knows_its_steps_and_goes_on_after_a_stop(
    build_tiny_model: Any, tmp_path: Path
) -> None:
    """43 rows in steps of 4: 11 steps. Stopped after 6, in the third epoch, all goes on alike."""
    whole = pruned(build_tiny_model().double(), tmp_path / "whole")
    whole.train()
    assert whole.state.global_step == whole.state.max_steps == 11
    assert whole.pruner.losses.isfinite().all()
    met = sorted(whole.pruner.chosen)
    assert met == [2, 3]
    changes = {"save_strategy": "steps", "save_steps": 6}
    stopped = pruned(build_tiny_model().double(), tmp_path / "cut", **changes)
    stopped.train()
    place = next(tmp_path.glob("cut/checkpoint-6"))
    kept = json.loads((place / "trainer_state.json").read_text())["stateful_callbacks"]
    assert set(kept["Memory"]["attributes"]["rows"]["chosen"]) == {"1", "2"}
    resumed = pruned(build_tiny_model(seed=9).double(), tmp_path / "cut", **changes)
    resumed.train(resume_from_checkpoint=str(place))
    torch.testing.assert_close(
        flat(resumed.model.state_dict()), flat(whole.model.state_dict()), rtol=0, atol=1e-12
    )
    assert resumed.pruner.chosen == whole.pruner.chosen
