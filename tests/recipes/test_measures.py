"""TOFU as the benchmark of a run: compared with the retain model, the best measured step kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import UserError
from unlearn.recipes.files import load
from unlearn.recipes.run import run

ROWS = 3


@pytest.fixture
def tofu(shared: Path, tmp_path: Path) -> Path:
    """Give TOFU with the first rows of every set."""
    folder = tmp_path / "tofu"
    folder.mkdir()
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        lines = (shared / "data" / "tofu" / f"{name}_perturbed.json").read_text().splitlines()
        (folder / f"{name}_perturbed.json").write_text("\n".join(lines[:ROWS]) + "\n")
    return folder


@pytest.fixture
def recipe(shared: Path, tofu: Path, tmp_path: Path) -> Any:
    """Give a function from overrides to a short run on the small TOFU."""

    def build(*overrides: str) -> Any:
        changes = {
            "model": {
                "path": str(shared / "models" / "tofu-tiny-target"),
                "retain_model": str(shared / "models" / "tofu-tiny-retain90"),
            },
            "data": {
                "forget": f"{tofu}#forget10_perturbed",
                "retain": f"{tofu}#retain_perturbed",
            },
            "out": str(tmp_path / "run"),
        }
        short = [
            "training.max_steps=4",
            "training.per_device_train_batch_size=2",
            "training.warmup_steps=0",
            "terms.forget.weight=1.0",
            f"evals.tofu.data={tofu}",
            "evals.max_new_tokens=8",
        ]
        return load("tofu-tiny/npo", [*short, *overrides], changes)

    return build


def test_the_best_measured_step_becomes_the_model(recipe: Any, tmp_path: Path) -> None:
    """The forget probability falls at every step, so the one that keeps it highest is the first."""
    metric = "exact_memorization"
    results = run(
        recipe("evals.every=1", f"evals.select_best.metric={metric}", "training.learning_rate=2e-3")
    )
    steps = {one["step"]: one["metrics"] for one in results["steps"]}
    assert sorted(steps) == [1, 2, 3, 4]
    best = min(steps, key=lambda step: (steps[step][metric], step))
    assert results["selected"]["step"] == best
    assert results["selected"]["value"] == steps[best][metric]
    after = results["metrics"]["after"]
    assert after["forget_Q_A_Prob"] == pytest.approx(steps[best]["forget_Q_A_Prob"], rel=1e-4)
    assert results["metrics"]["retain_model"]["forget_quality"] == 1.0
    assert after["forget_quality_ks"] < 1
    assert len(results["truth_ratios"]["before"]) == ROWS
    assert results["leakage"]["before"]["leaked"] == ROWS
    stored = json.loads((tmp_path / "run" / "evals" / "step-1.json").read_text())
    assert stored["benchmark"] == "tofu"


def test_constraints_that_no_step_meets_are_reported(recipe: Any) -> None:
    results = run(
        recipe(
            "evals.every=1",
            "training.max_steps=1",
            "evals.generate=false",
            "evals.select_best.metric=forget_Q_A_Prob",
            "evals.select_best.constraints.retain_Q_A_Prob=1.1",
        )
    )
    assert not results["selected"]["satisfied"]
    assert any("retain_Q_A_Prob 1.1" in line for line in results["warnings"])


def test_mistakes_are_named_before_training(recipe: Any, tofu: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metric in evals\.select_best: 'utility'"):
        run(recipe("evals.every=1", "evals.generate=false", "evals.select_best.metric=utility"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    (tofu / "world_facts_perturbed.json").unlink()
    with pytest.raises(UserError, match="world_facts_perturbed"):
        run(recipe(f"out={tmp_path / 'other'}"))
    assert not (tmp_path / "other").exists()


def test_a_stored_evaluation_stands_for_the_retain_model(
    recipe: Any, shared: Path, tmp_path: Path
) -> None:
    logs = shared / "parity" / "tofu_eval_ou_tofu-tiny-retain90.json.gz"
    with pytest.raises(UserError, match="both given"):
        run(recipe(f"evals.tofu.retain_logs={logs}"))
    with pytest.raises(UserError, match="400 rows"):
        run(recipe(f"evals.tofu.retain_logs={logs}", "model.retain_model=null"))
