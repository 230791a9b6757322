"""Every engine takes the same steps: two processes with any of them against one process without.

Two processes share gloo on a CPU. The rows do not divide evenly: 13 rows, 2 at once per process, 8
per step. ``make test`` runs each engine once and starts processes in each way once: a launch takes
as long as all the steps. The matrix of engines and parts is slow.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest import mock

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
    "refused": [],
    "apart": ["training.passes=apart"],
    "slopes": ["training.passes=apart"],
    "measured": [
        "terms.forget.layer=1", "terms.retain.layer=1", "terms.retain.weight=1",
        "training.trainable=[down_proj]",
    ],
}  # fmt: skip
METHODS = {"refused": "idk_dpo", "slopes": "idk_dpo", "measured": "adaptive_rmu"}
"""Variants of another method than NPO; the loss of ``idk_dpo`` is of two streams at once."""
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


def command(
    out: str,
    *arguments: str,
    settings: list[str],
    program: Sequence[str] = COMMAND,
    method: str = "npo",
) -> list[str]:
    given = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    changes = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return [*program, "run", method, *given, "--out", out, *arguments, *changes,
            "--json", "--offline"]  # fmt: skip


def started(place: Path, out: str, *arguments: str, **how: Any) -> dict[str, Any]:
    """Run a method with the real command; give its results with the steps as they were logged."""
    words = command(out, *arguments, **how)
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def alone(place: Path, variant: str, extra: tuple[str, ...] = ()) -> Path:
    """Give the run of one process, done once per variant: the command's, in this process."""
    from unlearn.cli.main import main

    out = "-".join(["alone", variant, *extra]).replace(".", "_")
    if not (place / out).exists():
        settings = [*VARIANTS[variant], *extra]
        words = command(out, settings=settings, program=(), method=METHODS.get(variant, "npo"))
        with (
            chdir(place),
            mock.patch.object(sys, "argv", ["unlearn", *words]),
            pytest.raises(SystemExit) as end,
        ):
            main()
        assert not end.value.code
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
    method = METHODS.get(variant, "npo")
    started(place, out, "--nproc", "2", "--engine", engine, settings=settings, method=method)
    same(alone(place, variant, extra), place / out)


@pytest.mark.parametrize(("engine", "variant"), [("ddp", "full"), ("zero2", "lora")])
def test_an_engine_takes_the_steps_of_one_process(place: Path, engine: str, variant: str) -> None:
    matches(place, engine, variant)


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def test_torchrun_may_start_the_processes(place: Path) -> None:
    program = [sys.executable, "-m", *TORCHRUN, "-m", "unlearn.cli"]
    found = started(place, "torchrun", "--engine", "fsdp2", settings=[], program=program)
    assert found["metrics"]["after"]
    manifest = json.loads((place / "torchrun" / "manifest.json").read_text())
    assert manifest["processes"] == 2
    same(alone(place, "full"), place / "torchrun")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def on_two_nodes(place: Path, *words: str) -> list[tuple[int, str, str]]:
    """Run the same command twice at once, as on two nodes; give code, stdout and stderr of both."""
    both = [
        subprocess.Popen(
            words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        said = [one.communicate(timeout=240) for one in both]
    finally:
        for one in both:
            one.kill()
    return [(one.returncode, *texts) for one, texts in zip(both, said, strict=True)]


def test_two_nodes_take_the_steps_of_one(place: Path) -> None:
    """Two nodes of one process are two processes: the first speaks, the other says nothing."""
    where = ["--nnodes", "2", "--nproc", "1", "--rdzv", f"localhost:{free_port()}"]
    ended = on_two_nodes(place, *command("nodes", *where, "--engine", "zero3", settings=[]))
    assert [code for code, _, _ in ended] == [0, 0], ended
    spoken = [out for _, out, _ in ended if out]
    assert len(spoken) == 1
    assert json.loads(spoken[0])["metrics"]["after"]
    assert json.loads((place / "nodes" / "manifest.json").read_text())["processes"] == 2
    same(alone(place, "full"), place / "nodes")


@pytest.mark.slow
def test_a_stopped_node_stops_the_other_and_both_resume_at_another_place(place: Path) -> None:
    """As on a cluster: the signal reaches one node, and the next allocation has other nodes."""
    where = ["--nnodes", "2", "--nproc", "1", "--rdzv", f"localhost:{free_port()}"]
    words = command("stopped", *where, settings=["training.max_steps=300"])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    both = [subprocess.Popen(words, cwd=place, **quiet) for _ in range(2)]
    try:
        events = place / "stopped" / "events.jsonl"
        until = time.monotonic() + 120
        while not (events.exists() and '"step"' in events.read_text()):
            assert time.monotonic() < until
            assert [one.poll() for one in both] == [None, None]
            time.sleep(0.1)
        both[1].send_signal(signal.SIGTERM)
        assert [one.wait(timeout=120) for one in both] == [75, 75]
    finally:
        for one in both:
            one.kill()
    words = [*COMMAND, "resume", "stopped", "--rdzv", f"localhost:{free_port()}", "--json"]
    ended = on_two_nodes(place, *words)
    assert [code for code, _, _ in ended] == [0, 0], ended
    (spoken,) = [json.loads(out) for _, out, _ in ended if out]
    assert spoken["training"]["steps"] == 300


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, "zero3-offload"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_works_on_every_engine(place: Path, engine: str, variant: str) -> None:
    matches(place, engine, variant)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_tied_to_the_embedding(place: Path, engine: str) -> None:
    matches(place, engine, "full", ("model.path=tied",))
