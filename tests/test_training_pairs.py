"""The trainer with pairs of answers: what must not change the step does not change the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tests.test_training import assert_same, examples, weights
from unlearn import checkpoints, reference
from unlearn.data.answers import Draws, OtherAnswers
from unlearn.data.collate import Collator, StreamDataset
from unlearn.monitors import StepEvents, StopRequest
from unlearn.objectives import OBJECTIVES
from unlearn.packing import packable
from unlearn.reference import LiveReference
from unlearn.scores import Scorer
from unlearn.training import Term, UnlearningTrainer

DPO = (
    Term(OBJECTIVES["dpo"], "refusal", 1.0, {"beta": 0.1}, rejected="forget"),
    Term(OBJECTIVES["nll"], "retain", 0.5),
)
AP = (
    Term(OBJECTIVES["nll"], "refusal"),
    Term(OBJECTIVES["ap"], "retain", 1.0, {"beta": 0.2}, rejected="retain_refusal"),
)
STREAMS = {"forget": examples(16, 1), "retain": examples(20, 2)}
REFUSALS = 3


def others() -> dict[str, OtherAnswers]:
    found = {}
    for seed, (name, size) in enumerate((("refusal", 16), ("retain_refusal", 20)), start=3):
        places = {(row, k): REFUSALS * row + k for row in range(size) for k in range(REFUSALS)}
        drawn = Draws(name, 5, [REFUSALS] * size, 2, places)
        found[name] = OtherAnswers(drawn, examples(REFUSALS * size, seed))
    return found


OTHERS = others()


def trainer_for(
    model: Any,
    folder: Path,
    *,
    terms: Any = DPO,
    stored: Any = None,
    live: Any = None,
    **changes: Any,
) -> UnlearningTrainer:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_train_epochs": 2,
        "learning_rate": 1e-3, "remove_unused_columns": False, "report_to": [], "seed": 5,
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True,
        "dataloader_pin_memory": False, "warmup_steps": 0,
    } | changes  # fmt: skip
    read = {"retain", *(stream for term in terms for stream in term.streams)}
    return UnlearningTrainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=StreamDataset(STREAMS, seed=5, others=OTHERS, only=read),
        data_collator=Collator(0, stored or {}),
        terms=terms,
        scorer=Scorer.for_model(model),
        live=live,
    )


def stored_reference(model: Any) -> dict[str, Any]:
    """Score both answers of every pair."""
    rows = {"forget": STREAMS["forget"], "refusal": OTHERS["refusal"].examples}
    scorer = Scorer.for_model(model)
    return {name: reference.score_rows(scorer, model, each) for name, each in rows.items()}


@pytest.fixture
def make(build_tiny_model: Any) -> Any:
    return lambda **changes: build_tiny_model(**changes).double()


@pytest.mark.parametrize("terms", [DPO, AP], ids=["idk_dpo", "idk_ap"])
def test_accumulation_changes_nothing(terms: Any, make: Any, tmp_path: Path) -> None:
    """1 row x 8 accumulated = 8 rows x 1 = 4 x 2; answers of a pair differ in length."""
    found = []
    for batch, accumulate in ((8, 1), (1, 8), (4, 2)):
        model = make()
        start = weights(model)
        trainer_for(
            model, tmp_path, terms=terms, stored=stored_reference(model),
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        ).train()  # fmt: skip
        found.append(weights(model))
        assert max((start[name] - found[-1][name]).abs().max() for name in start) > 1e-3
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_cached_reference_equals_live_copy(make: Any, tmp_path: Path) -> None:
    first, second = make(), make()
    trainer_for(first, tmp_path, stored=stored_reference(first)).train()
    trainer_for(second, tmp_path, live=LiveReference.of(second)).train()
    assert_same(weights(first), weights(second))


def test_cached_reference_equals_adapters_off(make: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(make(), config).double()

    first, second = adapted(), adapted()
    trainer_for(first, tmp_path, stored=stored_reference(make())).train()
    trainer_for(second, tmp_path, live=LiveReference.of(second)).train()
    assert_same(weights(first), weights(second))


def test_packed_training_equals_padded(make: Any, tmp_path: Path) -> None:
    first, second = make(), make()
    stored = stored_reference(first)
    trainer_for(first, tmp_path, stored=stored).train()
    with packable(second):
        trainer_for(second, tmp_path, stored=stored).train()
    assert_same(weights(first), weights(second))


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_equals_uninterrupted(stop_after: int, make: Any, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch (2 steps each) or of the run, then continued."""
    whole, part = make(), make()
    stored = stored_reference(whole)
    trainer_for(whole, tmp_path / "whole", stored=stored).train()

    stop = StopRequest()
    stopped = trainer_for(part, tmp_path / "part", stored=stored)
    stopped.add_callback(
        StepEvents(lambda e: setattr(stop, "requested", e["step"] >= stop_after), dict)
    )
    stopped.add_callback(stop)
    stopped.train()
    assert stopped.state.global_step == stop_after

    name, _ = checkpoints.choose(tmp_path / "part")
    fresh = make(seed=9)
    trainer_for(fresh, tmp_path / "part", stored=stored).train(
        resume_from_checkpoint=str(tmp_path / "part" / str(name))
    )
    assert_same(weights(whole), weights(fresh))


@pytest.mark.parametrize("terms", [DPO, AP], ids=["idk_dpo", "idk_ap"])
def test_all_answers_join_one_forward_pass(terms: Any, make: Any, tmp_path: Path) -> None:
    """24 rows at once: 8 of each of three streams, and no second pass."""
    model, seen = make(), []
    model.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(len(named["input_ids"])),
        with_kwargs=True,
    )
    trainer = trainer_for(model, tmp_path, terms=terms, stored=stored_reference(model), max_steps=2)
    seen.clear()
    trainer.train()
    assert seen == [24, 24]


def test_readings_are_means_and_none_is_counted_twice(make: Any, tmp_path: Path) -> None:
    """At the first step DPO is (2 / beta) ln 2, and untrained NLL is about ln 300 = 5.7 nats."""
    model, events = make(), []
    trainer = trainer_for(model, tmp_path, stored=stored_reference(model), max_steps=1)
    trainer.add_callback(StepEvents(events.append, lambda: trainer.readings))
    trainer.train()
    (found,) = events
    assert found["refusal/dpo"] == pytest.approx(20 * 0.6931471805599453)
    for name in ("refusal/nll", "forget/nll", "retain/nll"):
        assert 5 < found[name] < 7


def test_the_pair_pulls_its_two_answers_apart(make: Any, tmp_path: Path) -> None:
    model = make()
    scorer = Scorer.for_model(model)

    def margin() -> float:
        chosen = reference.score_rows(scorer, model, OTHERS["refusal"].examples)
        rejected = reference.score_rows(scorer, model, STREAMS["forget"])
        mean = torch.stack([row.sum() for row in chosen]).mean()
        return float(mean - torch.stack([row.sum() for row in rejected]).mean())

    before = margin()
    trainer_for(model, tmp_path, stored=stored_reference(model), num_train_epochs=6).train()
    assert margin() > before + 2
