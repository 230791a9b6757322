"""Equivalences of the trainer: what must not change the step does not change the weights.

They hold for single answers and for pairs of them (``dpo``, ``ap``). Models are in float64, so that
two orders of summation agree far below the tolerance.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from unlearn import checkpoints, reference
from unlearn.data.answers import Draws, OtherAnswers
from unlearn.data.collate import Collator, StreamDataset
from unlearn.data.encode import Example
from unlearn.errors import RunFailed
from unlearn.monitors import StepEvents, StopRequest, UpdateCheck
from unlearn.objectives import OBJECTIVES
from unlearn.packing import can_pack, packable
from unlearn.reference import LiveReference
from unlearn.scores import Scorer
from unlearn.terms import Term
from unlearn.training import UnlearningTrainer

NPO = (Term(OBJECTIVES["npo"], "forget", 1.0, {"beta": 0.1}), Term(OBJECTIVES["nll"], "retain"))
DPO = (
    Term(OBJECTIVES["dpo"], "refusal", 1.0, {"beta": 0.1}, rejected="forget"),
    Term(OBJECTIVES["nll"], "retain", 0.5),
)
AP = (
    Term(OBJECTIVES["nll"], "refusal"),
    Term(OBJECTIVES["ap"], "retain", 1.0, {"beta": 0.2}, rejected="retain_refusal"),
)
ODD = (
    Term(OBJECTIVES["pdu"], "forget"),
    Term(OBJECTIVES["pdu_retain"], "retain", 1.0, {
        "multiplier": 2.0, "step_size": 3.0, "epsilon": 4.0, "warmup_epochs": 0.0}),
)  # fmt: skip
PAIRS = {"idk_dpo": DPO, "idk_ap": AP}
CACHED = {"npo+nll": NPO, "idk_dpo": DPO}
"""Terms that compare log-probabilities alone: the reference can be stored."""
LIVE = {
    "ascent+kl": (
        Term(OBJECTIVES["grad_ascent"], "forget", 0.5),
        Term(OBJECTIVES["kl"], "retain", 2.0),
    ),
    "pdu": ODD,
    "undial+npo": (Term(OBJECTIVES["undial"], "forget"), Term(OBJECTIVES["npo"], "forget")),
    "ceu+satimp": (
        Term(OBJECTIVES["ceu"], "forget"),
        Term(OBJECTIVES["satimp"], "forget", 1.0, {"granularity": "instance", "beta1": 0.01}),
    ),
    "sampled": (
        Term(OBJECTIVES["ga_sampled"], "forget", 1.0, {"sampling": "random", "fraction": 0.4}),
        Term(OBJECTIVES["undial_all_positions"], "retain"),
    ),
    "groups": (Term(OBJECTIVES["simimp"], "forget", 1.0, {"granularity": "group"}),),
}
FAMILY = CACHED | PAIRS | LIVE


def examples(count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(count):
        length = int(torch.randint(6, 15, (1,), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        found.append(Example(ids, [-100] * 3 + ids[3:], 3, row))
    return found


STREAMS = {"forget": examples(16, 1), "retain": examples(20, 2)}
REFUSALS = 3


def others() -> dict[str, OtherAnswers]:
    """Give three refusals to every row."""
    found = {}
    for seed, (name, size) in enumerate((("refusal", 16), ("retain_refusal", 20)), start=3):
        places = {(row, k): REFUSALS * row + k for row in range(size) for k in range(REFUSALS)}
        drawn = Draws(name, 5, [REFUSALS] * size, 2, places)
        found[name] = OtherAnswers(drawn, examples(REFUSALS * size, seed))
    return found


OTHERS = others()
ROWS = STREAMS | {name: answers.examples for name, answers in OTHERS.items()}


def trainer_for(
    model: Any,
    folder: Path,
    *,
    terms: Any = NPO,
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


def stored_reference(model: Any, terms: Any = NPO) -> dict[str, Any]:
    """Score what terms compare with: the forget rows, or both answers of every pair."""
    scorer = Scorer.for_model(model)
    asked = {s for term in terms if term.objective.uses_reference for s in term.streams}
    return {name: reference.score_rows(scorer, model, ROWS[name]) for name in sorted(asked)}


def weights(model: Any) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture
def make(build_tiny_model: Any) -> Any:
    return lambda **changes: build_tiny_model(**changes).double()


@pytest.mark.parametrize("method", FAMILY)
def test_accumulation_changes_nothing(method: str, make: Any, tmp_path: Path) -> None:
    """1 row x 8 accumulated = 8 rows x 1: rows differ in length, so a mean of means would fail."""
    found, terms = [], FAMILY[method]
    for batch, accumulate in ((8, 1), (1, 8), (4, 2)):
        model = make()
        start = weights(model)
        live = LiveReference.of(model) if method in LIVE else None
        stored = None if live else stored_reference(model, terms)
        trainer_for(
            model, tmp_path, terms=terms, stored=stored, live=live,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        ).train()  # fmt: skip
        found.append(weights(model))
        assert max((start[name] - found[-1][name]).abs().max() for name in start) > 1e-3
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


cached = pytest.mark.parametrize("terms", CACHED.values(), ids=list(CACHED))


@cached
def test_cached_reference_equals_live_copy(terms: Any, make: Any, tmp_path: Path) -> None:
    first, second = make(), make()
    trainer_for(first, tmp_path, terms=terms, stored=stored_reference(first, terms)).train()
    trainer_for(second, tmp_path, terms=terms, live=LiveReference.of(second)).train()
    assert_same(weights(first), weights(second))


@cached
def test_cached_reference_equals_adapters_off(terms: Any, make: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(make(), config).double()

    first, second = adapted(), adapted()
    trainer_for(first, tmp_path, terms=terms, stored=stored_reference(make(), terms)).train()
    live = LiveReference.of(second)
    assert live.model is None
    trainer_for(second, tmp_path, terms=terms, live=live).train()
    assert_same(weights(first), weights(second))
    moved = [name for name, tensor in weights(first).items() if "lora_B" in name and tensor.any()]
    assert moved


@cached
def test_packed_training_equals_padded(terms: Any, make: Any, tmp_path: Path) -> None:
    first, second = make(), make()
    stored = stored_reference(first, terms)
    trainer_for(first, tmp_path, terms=terms, stored=stored).train()
    assert can_pack(second)
    with packable(second):
        trainer_for(second, tmp_path, terms=terms, stored=stored).train()
    assert_same(weights(first), weights(second))


def test_gradient_checkpointing_changes_nothing(make: Any, tmp_path: Path) -> None:
    first, second = make(), make()
    stored = stored_reference(first)
    trainer_for(first, tmp_path, stored=stored).train()
    with packable(second):
        trainer_for(
            second, tmp_path, stored=stored, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        ).train()  # fmt: skip
    assert_same(weights(first), weights(second))


def train_until(trainer: UnlearningTrainer, step: int) -> str:
    """Stop after this step; give the checkpoint that a resumed run takes."""
    stop = StopRequest()
    trainer.add_callback(
        StepEvents(lambda event: setattr(stop, "requested", event["step"] >= step), dict)
    )
    trainer.add_callback(stop)
    trainer.train()
    assert trainer.state.global_step == step
    name, _ = checkpoints.choose(Path(trainer.args.output_dir))
    assert name is not None
    return str(Path(trainer.args.output_dir) / name)


@cached
@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_equals_uninterrupted(
    stop_after: int, terms: Any, make: Any, tmp_path: Path
) -> None:
    """Stopped in the middle of an epoch (2 steps each) or of the run, then continued."""
    whole, part, fresh = make(), make(), make(seed=9)
    given = {"terms": terms, "stored": stored_reference(whole, terms)}
    trainer_for(whole, tmp_path / "whole", **given).train()
    last = train_until(trainer_for(part, tmp_path / "part", **given), stop_after)
    trainer_for(fresh, tmp_path / "part", **given).train(resume_from_checkpoint=last)
    assert_same(weights(whole), weights(fresh))


def curve(trainer: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    trainer.add_callback(StepEvents(events.append, trainer.summary))
    trainer.train()
    return events


def test_a_multiplier_moves_once_per_step_with_the_steps_mean(make: Any, tmp_path: Path) -> None:
    """Each step it grows by 3 (retain NLL - 4); steps see the one from before."""
    for batch, accumulate in ((8, 1), (1, 8)):
        steps = curve(trainer_for(
            make(), tmp_path, terms=ODD, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        ))  # fmt: skip
        expected = 2.0
        assert len(steps) == 4
        for step in steps:
            assert step["pdu_retain.multiplier"] == pytest.approx(expected)
            assert step["retain/pdu_retain"] == pytest.approx(expected * step["retain/nll"])
            expected = max(0.0, expected + 3.0 * (step["retain/nll"] - 4.0))
        assert expected > 5  # about ln 300 - 4 = 1.7 per step, times 3


def test_a_bound_is_taken_from_the_first_step(make: Any, tmp_path: Path) -> None:
    terms = (ODD[0], Term(OBJECTIVES["pdu_retain"], "retain", 1.0, {"warmup_epochs": 1.0}))
    steps = curve(trainer_for(make(), tmp_path, terms=terms))
    bound = 1.1 * steps[0]["retain/nll"]
    assert [step.get("pdu_retain.bound") for step in steps] == [None, *[pytest.approx(bound)] * 3]
    assert [step["pdu_retain.multiplier"] for step in steps[:3]] == [100.0] * 3
    moved = 100.0 + 5.0 * (steps[2]["retain/nll"] - bound)
    assert steps[3]["pdu_retain.multiplier"] == pytest.approx(moved)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_multiplier_equals_an_uninterrupted_one(
    stop_after: int, make: Any, tmp_path: Path
) -> None:
    """The bound comes from the first step, so a resumed run could not find it by itself."""
    terms = (ODD[0], Term(OBJECTIVES["pdu_retain"], "retain", 0.1, {"warmup_epochs": 0.5}))
    whole = make()
    steps = curve(trainer_for(whole, tmp_path / "whole", terms=terms))
    last = train_until(trainer_for(make(), tmp_path / "part", terms=terms), stop_after)
    fresh = make(seed=9)
    trainer = trainer_for(fresh, tmp_path / "part", terms=terms)
    events: list[dict[str, Any]] = []
    trainer.add_callback(StepEvents(events.append, trainer.summary))
    trainer.train(resume_from_checkpoint=last)
    assert_same(weights(whole), weights(fresh))
    for step, resumed in zip(steps[stop_after:], events, strict=True):
        assert resumed["pdu_retain.multiplier"] == pytest.approx(step["pdu_retain.multiplier"])
        assert resumed["pdu_retain.bound"] == pytest.approx(step["pdu_retain.bound"])


def test_readings_are_step_means(make: Any, tmp_path: Path) -> None:
    """At the first step NPO is (2 / beta) ln 2 and the readings do not depend on accumulation."""
    seen: dict[int, list[Any]] = {}
    for batch, accumulate in ((8, 1), (2, 4)):
        model, events = make(), []
        trainer = trainer_for(
            model, tmp_path, stored=stored_reference(model), max_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        trainer.add_callback(StepEvents(events.append, lambda trainer=trainer: trainer.readings))
        trainer.train()
        seen[batch] = events
    one, four = seen[8][0], seen[2][0]
    assert one["forget/npo"] == pytest.approx(20 * 0.6931471805599453)
    for key in ("forget/npo", "retain/nll", "forget/nll"):
        assert one[key] == pytest.approx(four[key])
    assert 4 < one["retain/nll"] < 8  # untrained: about ln 300 = 5.7 nats per token, counted once


@pytest.mark.parametrize("terms", PAIRS.values(), ids=list(PAIRS))
def test_all_answers_join_one_forward_pass(terms: Any, make: Any, tmp_path: Path) -> None:
    """24 rows at once: 8 of each of three streams, and no second pass."""
    model, seen = make(), []
    model.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(len(named["input_ids"])),
        with_kwargs=True,
    )
    stored = stored_reference(model, terms)
    trainer = trainer_for(model, tmp_path, terms=terms, stored=stored, max_steps=2)
    seen.clear()
    trainer.train()
    assert seen == [24, 24]


def test_readings_are_means_and_none_is_counted_twice(make: Any, tmp_path: Path) -> None:
    """At the first step DPO is (2 / beta) ln 2, and untrained NLL is about ln 300 = 5.7 nats."""
    model, events = make(), []
    stored = stored_reference(model, DPO)
    trainer = trainer_for(model, tmp_path, terms=DPO, stored=stored, max_steps=1)
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
    stored = stored_reference(model, DPO)
    trainer_for(model, tmp_path, terms=DPO, stored=stored, num_train_epochs=6).train()
    assert margin() > before + 2


def test_a_frozen_tensor_and_a_stuck_tensor_are_told_apart(make: Any, tmp_path: Path) -> None:
    model, events = make(), []
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    stuck = model.model.layers[1].mlp.up_proj.weight
    stuck.register_hook(torch.zeros_like)
    trainer = trainer_for(model, tmp_path, stored=stored_reference(model), weight_decay=0.0)
    trainer.add_callback(UpdateCheck(events.append))
    trainer.train()
    assert [event["event"] for event in events] == ["unmoved"]
    assert events[0]["tensors"] == ["model.layers.1.mlp.up_proj.weight"]


def test_non_finite_gradients_end_the_run_by_name(make: Any, tmp_path: Path) -> None:
    model = make()
    model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    trainer = trainer_for(model, tmp_path, stored=stored_reference(model))
    with pytest.raises(RunFailed, match=r"not finite in 1 trainable tensors: model\.norm\.weight"):
        trainer.train()


def test_unreached_tensors_end_the_run_by_name(make: Any, tmp_path: Path) -> None:
    model = make()
    model.orphan = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    trainer = trainer_for(model, tmp_path, stored=stored_reference(model))
    with pytest.raises(RunFailed, match="no gradient reached 1 trainable tensors: orphan"):
        trainer.train()


def test_nothing_moves_in_bfloat16_at_a_tiny_rate(build_tiny_model: Any, tmp_path: Path) -> None:
    model = build_tiny_model().bfloat16()
    stored = {"forget": reference.score_rows(Scorer.for_model(model), model, STREAMS["forget"])}
    trainer = trainer_for(model, tmp_path, stored=stored, learning_rate=1e-12, weight_decay=0.0)
    trainer.add_callback(UpdateCheck(lambda event: None))
    with pytest.raises(RunFailed, match="moved no weight at all"):
        trainer.train()


def test_lora_is_not_reported_although_a_starts_without_gradient(make: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model, events = get_peft_model(make(), config).double(), []
    trainer = trainer_for(model, tmp_path, live=LiveReference.of(model), weight_decay=0.0)
    trainer.add_callback(UpdateCheck(events.append))
    trainer.train()
    assert events == []
