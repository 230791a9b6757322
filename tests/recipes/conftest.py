"""A runnable recipe of a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.recipes.files import load

FAST = {
    "training": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
    },
    "evals": {"max_rows": 3, "max_new_tokens": 4},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: Any, build_tiny_model: Any, build_tiny_tokenizer: Any):
    """Give a function that makes a runnable recipe of a tiny model in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    build_tiny_model().save_pretrained("model")
    build_tiny_tokenizer().save_pretrained("model")
    for name, words in (("forget", "was born"), ("retain", "paints")):
        rows = ({"question": f"Who is {n}?", "answer": f"{n} {words}."} for n in range(10))
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(method: str = "npo", *changes: str, out: str = "out") -> Any:
        given = FAST | {
            "model": {"path": "model"},
            "data": {"forget": "forget.jsonl", "retain": "retain.jsonl"},
            "out": out,
        }
        return load(method, changes, given)

    return make
