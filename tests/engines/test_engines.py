"""Every engine takes the same steps: two processes with any of them against one process without.

Two processes share gloo on a CPU. The rows do not divide evenly: 13 rows, 2 at once per process, 8
per step. ``make test`` runs each engine once; the rest of the matrix is slow.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
COMMAND = [sys.executable, "-m", "unlearn.cli"]
SETTINGS = [
    "training.max_steps=5", "training.learning_rate=1e-2", "training.warmup_steps=1",
    "training.per_device_train_batch_size=2", "training.global_batch_size=8",
    "training.save_steps=3", "evals.max_rows=3", "evals.max_new_tokens=4",
]  # fmt: skip
VARIANTS = {
    "full": [],
    "lora": ["model.lora.rank=4"],
    "checkpointed": ["training.gradient_checkpointing=true"],
    "kl": ["terms.retain.objective=kl"],
    "kl-lora": ["terms.retain.objective=kl", "model.lora.rank=4"],
    "family": [
        "terms.forget.objective=undial",
        "terms.retain.objective=pdu_retain",
        "terms.retain.multiplier=1.0",
        "terms.retain.step_size=0.1",
        "terms.retain.warmup_epochs=0.0",
    ],
    "selected": ["evals.every=2", "evals.select_best.metric=forget_Q_A_Prob"],
}
EXACT = {"rtol": 0, "atol": 1e-4}
Started = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """Give a folder with models and rows of uneven number and length."""
    from tests.conftest import build_model, build_tokenizer

    folder: Path = tmp_path_factory.mktemp("engines")
    for name, tied in (("model", False), ("tied", True)):
        build_model(tie_word_embeddings=tied).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    for name, words, count in (("forget", "was born", 13), ("retain", "paints", 7)):
        rows = (
            {"question": f"Who is {n}{'x' * (n % 4)}?", "answer": f"{n} {words}{' a' * (n % 5)}."}
            for n in range(count)
        )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def started(place: Path, out: str, *arguments: str, settings: list[str]) -> dict[str, Any]:
    """Run NPO with the real command; give its results with the steps as they were logged."""
    given = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    changes = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    command = [*COMMAND, "run", "npo", *given, "--out", out, *arguments, *changes, "--json"]
    done = subprocess.run(
        [*command, "--offline"], cwd=place, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def alone(place: Path, variant: str, extra: tuple[str, ...] = ()) -> Path:
    """Give the run of one process, done once per variant."""
    out = "-".join(["alone", variant, *extra]).replace(".", "_")
    if not (place / out).exists():
        started(place, out, settings=[*VARIANTS[variant], *extra])
    return place / out


def steps(run: Path) -> list[dict[str, float]]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in event.items() if "/" in key or key == "grad_norm"}
        for event in events
        if event["event"] == "step"
    ]


def same(one: Path, other: Path) -> None:
    """Compare losses and gradient norms of every step, final weights, numbers and answers."""
    ours, theirs = steps(one), steps(other)
    assert len(ours) == len(theirs) == 5
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(yours, abs=1e-4)
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], **EXACT)
    start = load_file(one.parent / "model" / "model.safetensors")
    moved = max(float((weights[0][name] - start[name]).abs().max()) for name in weights[0])
    assert moved > 1e-2, "the run changed nothing: there is nothing to compare"
    assert written(one / "model") == written(other / "model")


def written(folder: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([[1, 40, 50, 60]])
    tokens = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return list(tokens[0].tolist())


def matches(place: Path, engine: str, variant: str, extra: tuple[str, ...] = ()) -> None:
    out = "-".join([engine, variant, *extra]).replace(".", "_")
    settings = [*VARIANTS[variant], *extra]
    started(place, out, "--nproc", "2", "--engine", engine, settings=settings)
    same(alone(place, variant, extra), place / out)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_takes_the_steps_of_one_process(place: Path, engine: str) -> None:
    matches(place, engine, "lora" if engine == "zero2" else "full")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, "zero3-offload"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_works_on_every_engine(place: Path, engine: str, variant: str) -> None:
    matches(place, engine, variant)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_tied_to_the_embedding(place: Path, engine: str) -> None:
    matches(place, engine, "full", ("model.path=tied",))
