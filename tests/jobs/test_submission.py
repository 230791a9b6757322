"""submitit runs a job, and brings a preempted one back: on this machine, in its own processes."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from unlearn.errors import UserError
from unlearn.jobs import Job, submit
from unlearn.jobs.job import RECIPE
from unlearn.recipes.files import find, read_text


@pytest.fixture
def submitit() -> Any:
    reason = "submitit is not installed: pip install 'unlearn-llm[slurm]'"
    return pytest.importorskip("submitit", reason=reason)


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: Any, build_tiny_model: Any, build_tiny_tokenizer: Any
) -> Path:
    build_tiny_model().save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    row = '{"question": "Who is %s?", "answer": "%s was born."}\n'
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text("".join(row % (n, n) for n in range(8)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(steps: int, **changes: Any) -> Job:
    settings = [
        f"training.max_steps={steps}", "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=1", "evals.max_rows=2", "evals.generate=false",
    ]  # fmt: skip
    pairs = [part for setting in settings for part in ("--set", setting)]
    data = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    words = [RECIPE, *data, "--out", "out", *pairs, "--offline"]
    recipe = read_text(find("npo"))
    return Job(words, "out", recipe=recipe, time="10", gpus_per_node=0, **changes)


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*_log.*")))


def test_a_job_runs_to_its_end(submitit: Any, place: Path) -> None:
    submitted = submit(job(2), cluster="local")
    assert submitted.folder == place / "out.slurm"
    assert submitted.handle.result() == 0, logs(submitted.folder)
    assert json.loads(Path("out/results.json").read_text())["training"]["steps"] == 2


@pytest.mark.slow
def test_a_preempted_job_saves_and_is_resumed(submitit: Any, place: Path) -> None:
    submitted = submit(job(300), cluster="local")
    events, until = place / "out" / "events.jsonl", time.monotonic() + 120
    while not (events.exists() and '"step"' in events.read_text()):
        assert not submitted.handle.done(), logs(submitted.folder)
        assert time.monotonic() < until
        time.sleep(0.1)
    (task,) = psutil.Process(
        int(submitted.id)
    ).children()  # the process itself is submitit's controller
    task.send_signal(signal.SIGUSR2)
    assert submitted.handle.result() == 0, logs(submitted.folder)
    text = logs(submitted.folder)
    assert text.count("Calling checkpoint method.") == 1
    assert "unlearning from checkpoint-" in text
    assert json.loads(Path("out/results.json").read_text())["training"]["steps"] == 300


def test_a_failed_job_is_told_and_not_run_again(submitit: Any, place: Path) -> None:
    Path("forget.jsonl").write_text('{"question": \n')
    submitted = submit(job(2), cluster="local")
    with pytest.raises(Exception, match="the run ended with exit code 2"):
        submitted.handle.result()
    assert logs(submitted.folder).count("error: ") == 1


def test_without_slurm_nothing_is_submitted(submitit: Any, monkeypatch: Any, place: Path) -> None:
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(UserError, match="there is no Slurm here"):
        submit(job(2))


def test_what_slurm_is_asked_for(submitit: Any, monkeypatch: Any, place: Path) -> None:
    """The script that submitit would submit, from its own writer; sbatch is a stand-in."""
    (place / "bin").mkdir()
    for name, text in (("srun", ""), ("sbatch", f"cp $1 {place}/script; echo job 7")):
        (place / "bin" / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{text}\n")
        (place / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place / "bin"))
    submitted = submit(job(2, nnodes=2, nproc=4, partition="gpu", setup="module load cuda"))
    assert submitted.id == "7"
    script = (place / "script").read_text()
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=16",
        "#SBATCH --time=10", "#SBATCH --partition=gpu", "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue", "#SBATCH --open-mode=append", "module load cuda",
    ):  # fmt: skip
        assert line in script.splitlines(), line
    assert "gpus" not in script
    assert "--kill-on-bad-exit=0" in script


def test_a_missing_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="submitit") as told:
        submit(Job(("npo",), "out"))
    assert "pip install 'unlearn-llm[slurm]'" in told.value.hint
