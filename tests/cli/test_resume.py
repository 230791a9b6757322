"""Stopped runs: exit code 75, a saved checkpoint, and the same weights in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STEPS = ("training.max_steps=8", "training.num_train_epochs=3")
"""Eight of the nine steps of three epochs: the last epoch is cut, as in a run with max_steps."""


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(run) / "model" / "model.safetensors"))


def assert_same_run(one: Any, other: Any) -> None:
    found, expected = weights(one["run"]), weights(other["run"])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    assert one["metrics"] == other["metrics"]
    assert [s["step"] for s in one["training"]["curve"]] == list(range(1, 9))
    for left, right in zip(one["training"]["curve"], other["training"]["curve"], strict=True):
        assert left["forget/npo"] == pytest.approx(right["forget/npo"], abs=1e-6)


@pytest.fixture
def stop_at(monkeypatch: Any) -> Any:
    """Give a function: when the next event like this comes, the process gets the signal."""

    def arrange(number: int, **wanted: Any) -> None:
        @contextmanager
        def listening(**_: Any) -> Any:
            def emit(event: dict[str, Any]) -> None:
                if wanted.items() <= event.items():
                    wanted["event"] = "never again"
                    os.kill(os.getpid(), number)

            yield emit

        monkeypatch.setattr("unlearn.cli.main.listening", listening)

    return arrange


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 2), (signal.SIGTERM, 5)])
def test_signal_while_training(run_npo, unlearn, stop_at, number, step):
    whole = run_npo(*STEPS, options=("--json",), out="whole").json
    stop_at(number, event="step", step=step)
    stopped = run_npo(*STEPS, options=("--json",), out="a run")
    assert stopped.code == 75
    lines = stopped.err.splitlines()
    assert lines == [
        f"interrupted: stopped after step {step}, which is saved",
        "  hint: `unlearn resume 'a run'` continues it",
    ]
    assert stopped.json["error"] | {"message": "", "hint": ""} == {
        "kind": "interrupted", "message": "", "hint": "", "exit_code": 75
    }  # fmt: skip
    assert (Path("a run") / "checkpoints" / f"checkpoint-{step}" / "complete.json").is_file()
    assert not (Path("a run") / "results.json").exists()
    resumed = unlearn("resume", "a run", "--json")
    assert resumed.code == 0, resumed.err
    assert_same_run(resumed.json, whole)


@pytest.mark.parametrize(
    "moment",
    [
        {"event": "stage", "stage": "load"},
        {"event": "stage", "stage": "reference"},
        {"event": "stage", "stage": "benchmark", "name": "after"},
    ],
    ids=lambda moment: f"{moment['stage']}-{moment.get('name', '')}",
)
def test_signal_before_and_after_training(run_npo, unlearn, stop_at, moment):
    whole = run_npo(*STEPS, options=("--json",), out="whole").json
    stop_at(signal.SIGINT, **moment)
    stopped = run_npo(*STEPS)
    assert stopped.code == 75
    assert "`unlearn resume out` continues it" in stopped.err
    assert not Path("out/results.json").exists()
    resumed = unlearn("resume", "out", "--json")
    assert resumed.code == 0, resumed.err
    assert_same_run(resumed.json, whole)


@pytest.mark.parametrize("steps", [-1, 8])
def test_signal_when_the_last_step_is_done(run_npo, unlearn, stop_at, steps):
    """The checkpoint holds the final weights; resuming must not train any further."""
    changes = ("training.num_train_epochs=3", f"training.max_steps={steps}",
               "training.lr_scheduler_type=constant", "training.warmup_steps=0")  # fmt: skip
    whole = run_npo(*changes, options=("--json",), out="whole").json
    stop_at(signal.SIGINT, event="stage", stage="save")
    assert run_npo(*changes).code == 75
    resumed = unlearn("resume", "out", "--json").json
    assert resumed["training"]["steps"] == whole["training"]["steps"]
    assert resumed["metrics"] == whole["metrics"]


def test_signal_before_there_is_a_folder(run_npo, stop_at):
    stop_at(signal.SIGTERM, event="stage", stage="start")
    stopped = run_npo(options=("--json",))
    assert stopped.code == 75
    assert "nothing was written; the same command starts again" in stopped.err
    assert not Path("out").exists()


def test_run_is_resumed_from_another_folder(world, run_npo, unlearn, stop_at, monkeypatch):
    changes = ("model.retain_model=model", "evals.generate=true", "evals.max_new_tokens=4")
    whole = run_npo(*STEPS, *changes, options=("--json",), out="whole").json
    (world / "data").mkdir()
    for name in ("forget", "retain"):
        (world / f"{name}.jsonl").rename(world / "data" / f"{name}.jsonl")
    stop_at(signal.SIGINT, event="step", step=3)
    given = {"forget": "data/forget.jsonl", "retain": "data/retain.jsonl:train[:12]"}
    assert run_npo(*STEPS, *changes, **given).code == 75
    monkeypatch.chdir("/")
    resumed = unlearn("resume", world / "out", "--json")
    assert resumed.code == 0, resumed.err
    whole["run"] = str(world / "whole")
    assert_same_run(resumed.json, whole)


def test_complete_run_is_shown_and_left_alone(world, run_npo, unlearn, monkeypatch):
    results = run_npo(options=("--json",)).json
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    Path("forget.jsonl").unlink()
    again = unlearn("resume", "out", "--json")
    assert again.code == 0, again.err
    assert again.json == results
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    monkeypatch.chdir("/")
    assert unlearn("resume", world / "out", "--json").json["model"] == str(world / "out" / "model")


def append_row(world: Path) -> None:
    with (world / "retain.jsonl").open("a") as file:
        file.write('{"question": "What does Bo paint?", "answer": "Nothing."}\n')


def test_changed_data_are_refused(world, run_npo, unlearn, stop_at):
    stop_at(signal.SIGINT, event="step", step=1)
    run_npo(*STEPS)
    append_row(world)
    outcome = unlearn("resume", "out", "--json")
    assert outcome.code == 2
    assert "the retain set" in outcome.err
    assert "has changed since the run was started" in outcome.err
    assert not Path("out/results.json").exists()


def test_changed_model_is_refused(world, run_npo, unlearn, stop_at, build_tiny_model):
    stop_at(signal.SIGINT, event="step", step=1)
    run_npo(*STEPS)
    build_tiny_model(seed=1).save_pretrained("model")
    outcome = unlearn("resume", "out")
    assert outcome.code == 2
    assert "has changed since the run began" in outcome.err
    assert Path("out/checkpoints/checkpoint-1").is_dir()


def test_second_writer_is_refused_and_harms_nothing(world, run_npo, unlearn, stop_at):
    from unlearn.runs import RunFolder

    stop_at(signal.SIGINT, event="step", step=1)
    run_npo(*STEPS)
    kept = set(Path("out").rglob("*"))
    with RunFolder(Path("out")).locked():
        outcome = unlearn("resume", "out", "--json")
    assert outcome.code == 2
    assert f"is being written by process {os.getpid()}" in outcome.err
    assert set(Path("out").rglob("*")) == kept


def test_a_second_writer_starts_no_processes(world, run_npo, unlearn, stop_at, monkeypatch):
    from unlearn.runs import RunFolder

    stop_at(signal.SIGINT, event="step", step=1)
    run_npo(*STEPS)
    recipe = Path("out/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("nproc: 1", "nproc: 2"))
    monkeypatch.setattr("unlearn.cli.main.start", lambda *_, **__: pytest.fail("started"))
    with RunFolder(Path("out")).locked():
        outcome = unlearn("resume", "out")
    assert outcome.code == 2
    assert "is being written by process" in outcome.err


def test_two_runs_into_one_new_folder(world, run_npo, monkeypatch):
    """Both found it empty; the second must not take away what the first has written."""
    from unlearn.recipes import run
    from unlearn.runs import RunFolder

    create = RunFolder.create

    def create_but_too_late(path: Path) -> RunFolder:
        folder = create(path)
        monkeypatch.setattr(run.RunFolder, "create", create)
        (path / "recipe.yaml").write_text("the first one's")
        return folder

    monkeypatch.setattr(run.RunFolder, "create", create_but_too_late)
    outcome = run_npo()
    assert outcome.code == 2
    assert "already exists" in outcome.err
    assert Path("out/recipe.yaml").read_text() == "the first one's"


def test_run_without_manifest_is_resumed(world, run_npo, unlearn, stop_at):
    """As after a kill between the first two files."""
    stop_at(signal.SIGINT, event="stage", stage="load")
    run_npo(*STEPS)
    Path("out/manifest.json").unlink()
    resumed = unlearn("resume", "out", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["provenance"]["forget"]["rows"] == 12


def test_recipe_of_a_run_repeats_it(world, run_npo, unlearn, monkeypatch):
    first = run_npo(*STEPS, options=("--json",), out="whole").json
    monkeypatch.chdir("/")
    again = unlearn("run", world / "whole/recipe.yaml", "--out", world / "again", "--json")
    assert again.code == 0, again.err
    first["run"] = str(world / "whole")
    assert_same_run(again.json, first)
    refused = unlearn("run", world / "whole/recipe.yaml")
    assert refused.code == 2
    assert "already exists" in refused.err


@pytest.mark.slow
def test_killed_run_is_resumed(world, run_npo, unlearn):
    """SIGKILL through the console script, anywhere between two checkpoints."""
    whole = run_npo(*STEPS, options=("--json",), out="whole").json
    recipe = Path("whole/recipe.yaml").read_text()
    Path("mine.yaml").write_text(recipe)
    console = Path(sys.executable).parent / "unlearn"
    process = subprocess.Popen(
        [console, "run", "mine.yaml", "--out", "out"], stderr=subprocess.PIPE
    )
    events = Path("out/events.jsonl")
    while process.poll() is None:
        if events.exists() and '"step": 4' in events.read_text():
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not Path("out/results.json").exists()
    resumed = unlearn("resume", "out", "--json")
    assert resumed.code == 0, resumed.err
    assert_same_run(resumed.json, whole)
    trained = [json.loads(line) for line in events.read_text().splitlines()]
    assert any(event.get("resumed_from") == "checkpoint-3" for event in trained)
