"""The command line in this process: exit code, stdout and stderr, in a folder of its own."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FAST = (
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "training.learning_rate=1e-3",
    "training.max_steps=2",
    "evals.max_rows=4",
    "evals.generate=false",
)
"""Settings with which a run of the tiny model takes a second."""


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def settings(*changes: str) -> list[str]:
    return [part for change in (*FAST, *changes) for part in ("--set", change)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def world(
    tmp_path: Path, monkeypatch: Any, build_tiny_model: Any, build_tiny_tokenizer: Any
) -> Path:
    """Work in a folder with a tiny ``model``, 12 rows to ``forget`` and 12 to ``retain``."""
    build_tiny_model().save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    born = [{"question": f"Where was {n} born?", "answer": f"{n} was born."} for n in range(12)]
    paints = [{"question": f"What does {n} paint?", "answer": "Small boats."} for n in range(12)]
    write_rows(tmp_path / "forget.jsonl", born)
    write_rows(tmp_path / "retain.jsonl", paints)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unlearn(monkeypatch: Any, capsys: Any) -> Callable[..., Outcome]:
    """Give a function that runs ``unlearn ARGUMENTS`` as the console script does."""
    from transformers.utils import logging

    from unlearn.cli.main import main

    # the command asks for this before its first import, which in tests was long ago
    logging.disable_progress_bar()

    def call(*arguments: object, program: Callable[[], None] = main) -> Outcome:
        name = "unlearn" if program is main else "detect-pretraining"
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            program()
        printed = capsys.readouterr()
        return Outcome(int(end.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def run_npo(world: Path, unlearn: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Give a function that runs two NPO steps on the tiny model, with options and --set texts."""

    def call(*changes: str, options: tuple[object, ...] = (), **flags: str) -> Outcome:
        given = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "out": "out"}
        pairs = [(f"--{key}", value) for key, value in (given | flags).items() if value]
        flat = [part for pair in pairs for part in pair]
        return unlearn("run", "npo", *flat, *settings(*changes), *options)

    return call
