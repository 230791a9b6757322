"""The formulas of a plan: by hand, against DeepSpeed's own, and against what a step holds."""

import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unlearn import models
from unlearn.head import CHUNK_BYTES
from unlearn.objectives import OBJECTIVES
from unlearn.packing import packable
from unlearn.recipes.communication import Machine, sent, traffic
from unlearn.recipes.footprint import Footprint
from unlearn.recipes.memory import (
    Batch,
    Training,
    activations,
    communication_buffers,
    head_bytes,
    held,
    model_states,
    training_parts,
)
from unlearn.scores import Scorer

ENGINES = ("none", "ddp", "fsdp2", "zero2", "zero3", "zero3-offload")
SIZE = Footprint(
    parameters=10_000_000, trainable=10_000_000, weights=20e6, trained=20_000_000, layer=1_500_000,
    ends=5_000_000, head=2_500_000, layers=10, vocabulary=1000, kept={None: 40_000.0},
    checkpointed={None: 2_000.0}, packed=200, packs=True, matrix=0,
)  # fmt: skip
BATCH = Batch(passes=((1000, None),), scored=(300, 400), full=(), longest=100)


def total(size: Footprint, batch: Batch, how: Training) -> float:
    return sum(part.bytes for part in training_parts(size, batch, how))


def meta(model: Any) -> Footprint:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return Footprint.of(AutoModelForCausalLM.from_config(model.config, dtype=model.dtype))


@pytest.mark.parametrize(
    ("engine", "expected"),
    [  # weights, gradients, fp32 copy, optimiser: 1000 parameters in bfloat16 on 4 devices
        ("none", (2000, 2000, 0, 4000)),
        ("ddp", (2000, 2000, 0, 4000)),
        ("fsdp2", (500, 500, 0, 1000)),
        ("zero2", (2000, 500, 1000, 2000)),
        ("zero3", (500, 500, 1000, 2000)),
        ("zero3-offload", (500, 500, 1000, 2000)),
    ],
)
def test_model_states_by_hand(engine: Any, expected: tuple[float, ...]) -> None:
    how = Training(engine, processes=4, half=True)
    found = model_states(how, weights=2000, trained=2000, trainable=1000)
    assert tuple(found.values()) == expected


def test_only_adapters_have_gradients_and_states() -> None:
    found = model_states(Training(half=True), weights=2000, trained=40, trainable=10)
    assert found == {"weights": 2000, "gradients": 40, "fp32 copy": 0, "optimizer": 80}


def test_fsdp2_keeps_whole_gradients_between_passes_unless_it_reduces_each() -> None:
    several = Training("fsdp2", processes=4, accumulation=2, half=True)
    found = model_states(several, weights=2000, trained=2000, trainable=1000)["gradients"]
    assert found == (500 if several.sync_each else 2000)


def test_zero_2_and_3_agree_with_deepspeeds_own_estimators() -> None:
    """For 800 million parameters on 4 devices; theirs leave out fp32 gradients in stage 3."""
    pytest.importorskip("deepspeed")
    code = """if True:
        from deepspeed.runtime.zero import stage3, stage_1_and_2
        two = stage_1_and_2.estimate_zero2_model_states_mem_needs
        three = stage3.estimate_zero3_model_states_mem_needs
        print(two(800_000_000, 4, 1, cpu_offload=False)[1])
        print(three(800_000_000, 1_000_000, 4, 1, cpu_offload=False, cpu_offload_params=False)[1])
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    stage2, stage3 = map(int, done.stdout.split()[-2:])
    size = replace(SIZE, parameters=800_000_000, trainable=800_000_000, weights=1.6e9,
                   trained=1_600_000_000)  # fmt: skip
    ours = {}
    for engine in ("zero2", "zero3"):
        how = Training(engine, processes=4, half=True)
        parts = {part.part: part.bytes for part in training_parts(size, BATCH, how)}
        names = ("weights", "gradients", "fp32 copy", "optimizer", "update")
        ours[engine] = sum(parts[name] for name in names)
    assert ours["zero2"] == stage2
    assert ours["zero3"] == stage3 - 4 * 1_000_000 + 2 * 800_000_000 / 4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("half", [True, False])
def test_more_devices_never_need_more_of_each(engine: Any, passes: int, half: bool) -> None:
    how = Training(engine, accumulation=passes, half=half, cuda=True)
    needed = [total(SIZE, BATCH, replace(how, processes=n)) for n in range(1, 65)]
    assert all(later <= before for before, later in pairwise(needed))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("processes", [1, 8])
def test_adapters_checkpointing_and_splitting_need_less(engine: Any, processes: int) -> None:
    how = Training(engine, processes=processes, half=True, accumulation=2)
    full = total(SIZE, BATCH, how)
    adapters = replace(SIZE, trainable=50_000, trained=200_000, head=0)
    assert total(adapters, BATCH, how) <= full
    assert total(SIZE, BATCH, replace(how, checkpointing=True)) < full
    if engine != "none":
        assert total(SIZE, BATCH, replace(how, engine="zero3-offload")) <= total(
            SIZE, BATCH, replace(how, engine="zero3")
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("passes", [1, 3])
def test_the_parts_are_whole_bytes_of_something_and_never_below_what_is_held(
    engine: Any, passes: int
) -> None:
    how = Training(engine, processes=2, half=True, accumulation=passes, cuda=True)
    parts = {part.part: part.bytes for part in training_parts(SIZE, BATCH, how)}
    states = sum(parts.get(name, 0) for name in ("weights", "fp32 copy", "optimizer"))
    passing = parts["activations"] + parts["head"]
    assert all(number >= 0 for name, number in parts.items() if name != "overlap")
    assert sum(parts.values()) >= states + max(passing, parts["gradients"])


def test_gradients_take_the_place_of_activations_in_a_step_of_one_pass() -> None:
    """Weights 20, states 40; activations 42 + head 4.85 go while 20 of gradients come (MB)."""
    kept = 1000 * 42_000
    head = 1.5 * 4 * 400 * 1000 + 2 * 2_500_000 + 4 * 700 * 1000
    assert total(SIZE, BATCH, Training(half=True)) == 20e6 + 40e6 + kept + head
    assert total(SIZE, BATCH, Training(half=True, accumulation=2)) == 80e6 + kept + head


def test_the_head_in_chunks_by_hand() -> None:
    row = 4 * SIZE.vocabulary
    frozen = replace(SIZE, head=0)
    small = Batch(passes=(), scored=(300, 400), full=(), longest=1)
    # log-probabilities of both stay, and the backward pass of the larger takes two more
    assert head_bytes(frozen, small) == 700 * row + 2 * 400 * row
    large = Batch(passes=(), scored=(10**6,), full=(), longest=1)
    assert head_bytes(frozen, large) == 3 * CHUNK_BYTES
    whole = Batch(passes=(), scored=(300,), full=(500,), longest=1)
    assert head_bytes(frozen, whole) == 300 * row + 8 * 500 * row


def test_deepspeed_casts_adapters_to_bfloat16() -> None:
    adapters = replace(SIZE, trainable=100_000, trained=400_000, weights=20e6 + 200_000)
    how = Training("zero2", processes=2, half=True)
    assert held(adapters, how) == (20e6, 200_000)
    assert held(adapters, replace(how, engine="ddp")) == (20e6 + 200_000, 400_000)


def test_deepspeeds_buckets_are_as_large_for_a_small_model_on_cuda() -> None:
    how = Training("zero2", processes=2, half=True, cuda=True)
    bucket = how.zero.get("reduce_bucket_size", 5e8)
    assert communication_buffers(SIZE, how) == 2 * 2 * bucket + 2 * min(bucket, SIZE.trainable)


# What a backward pass keeps


def test_what_a_llama_keeps_per_layer_by_hand(build_tiny_model: Any) -> None:
    """In bfloat16: two norms of 8h, queries and output 2h each, keys and values, the MLP's four.

    A norm keeps its input in fp32 (4h), what it scales (2h) and what it gives (2h); and one fp32
    number.
    """
    hidden, inner, keys = 64, 96, 32
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
    two, four = (
        meta(build_tiny_model(num_hidden_layers=n, **shape).to(torch.bfloat16)) for n in (2, 4)
    )
    each = 20 * hidden + 4 * keys + 8 * inner + 2 * 4
    assert (four.kept[None] - two.kept[None]) / 2 == pytest.approx(each, rel=0.01)
    assert (four.checkpointed[None] - two.checkpointed[None]) / 2 == pytest.approx(
        2 * hidden, rel=0.01
    )
    assert two.packs


def test_parameters_layers_and_ends_of_a_tiny_llama(tiny_model: Any) -> None:
    found = meta(tiny_model)
    layer = 4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert found.layer == layer
    assert found.ends == 4 * (2 * 300 * 32 + 32)
    assert found.weights == found.trained == 2 * layer + found.ends
    assert found.head == 4 * 300 * 32


class Live(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive, as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _real(t)}
        for tensor in filter(_real, tree_leaves(output)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.known or key in given:
                continue
            self.known[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return output

    def _gone(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.now -= size


def _real(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def rows(lengths: list[int], vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (len(lengths), max(lengths)))
    attended = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(~attended, -100),
        "attention_mask": attended.long(),
    }


@pytest.mark.parametrize("variant", ["plain", "packed", "checkpointed", "adapters", "kl", "bf16"])
def test_the_peak_of_a_real_step_is_as_estimated(variant: str, build_tiny_model: Any) -> None:
    """Forward and backward of two streams on a model large enough to drown what is not counted."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000}  # fmt: skip
    model = build_tiny_model(**shape).to(torch.bfloat16 if variant == "bf16" else torch.float32)
    size = meta(model)
    if variant == "adapters":
        model = models.add_lora(model, models.Lora())
        with torch.device("meta"):
            size = Footprint.of(
                models.add_lora(build_tiny_model(**shape).to("meta"), models.Lora())
            )
    model.train()
    if variant == "checkpointed":
        verb = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{verb}_checkpointing_enable")({"use_reentrant": False})
    lengths = [96, 96, 80, 72] if variant == "packed" else [96] * 4
    batches = {name: rows(lengths, 2000) for name in ("forget", "retain")}
    for parameter in model.parameters():  # gradients are not what is counted here
        parameter.grad = torch.zeros_like(parameter)
    live = Live()
    with packable(model) if variant == "packed" else nullcontext(), live:
        _step(model, batches, kl=variant == "kl")
    labelled = sum(lengths) - len(lengths)
    batch = Batch(
        passes=((2 * sum(lengths), None),),
        scored=(labelled,) if variant == "kl" else (labelled, labelled),
        full=(sum(lengths),) if variant == "kl" else (),
        longest=96,
    )
    size = replace(size, packs=variant == "packed", head=0 if variant == "adapters" else size.head)
    kept, working = activations(size, batch, variant == "checkpointed")
    assert live.peak == pytest.approx(kept + max(head_bytes(size, batch), working), rel=0.08)


def _step(model: Any, batches: dict[str, Any], *, kl: bool) -> None:
    scorer = Scorer.for_model(model, check=False)
    want = {"retain": {"logits"}} if kl else {}
    reference = None
    if kl:
        with torch.no_grad():
            reference = scorer.streams(model, {"retain": batches["retain"]}, want=want)["retain"]
    said = scorer.streams(model, batches, want=want)
    retain = OBJECTIVES["kl" if kl else "nll"](said["retain"], reference).sum()
    (OBJECTIVES["nll"](said["forget"], None).sum() + retain).backward()


# What is sent


@pytest.mark.parametrize(
    ("engine", "expected"),
    [  # W = 80 bytes, G = 40, N = 4, 3 passes: (N-1)/N = 3/4
        ("none", 0),
        ("ddp", 2 * 40 * 3 / 4),
        ("zero2", (3 * 2 * 40 + 40) * 3 / 4),
        ("fsdp2", (3 * 2 * 80 + 40) * 3 / 4),
        ("zero3", (3 * 2 * 80 + 3 * 40) * 3 / 4),
        ("zero3-offload", (3 * 2 * 80 + 3 * 40) * 3 / 4),
    ],
)
def test_bytes_sent_by_hand(engine: Any, expected: float) -> None:
    assert sent(traffic(engine, 4, weights=80, gradients=40, accumulation=3)) == expected
    assert traffic(engine, 1, weights=80, gradients=40, accumulation=3) == []


def test_reducing_every_pass_and_asking_the_frozen_start_cost_more() -> None:
    found = traffic("fsdp2", 2, weights=80, gradients=40, accumulation=3, passes=3, sync_each=True)
    assert [(part.times, part.bytes) for part in found] == [(9, 9 * 40), (3, 3 * 20)]


def test_time_on_paper_by_hand() -> None:
    machine = Machine(devices_per_node=8, inside=400.0, between=10.0, flops=100.0, used=0.5)
    assert machine.seconds(800, 8) == 2.0
    assert machine.seconds(800, 16) == 10.0  # eight adapters of 10 carry it past each node
    assert machine.compute_seconds(parameters=25, tokens=2) == 6.0
