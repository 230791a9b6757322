"""``unlearn reapply`` on a run's update."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from unlearn.cli.main import app
from unlearn.edits.update import Update, save_update
from unlearn.errors import UserError

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def place(tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any) -> Path:
    build_tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    update = Update({NAME: torch.ones(32, 48)}, {"edit": "kfade", "start": "other"})
    save_update(update, tmp_path / "update.safetensors")
    return tmp_path


def words(place: Path, *more: str) -> list[str]:
    return ["reapply", str(place / "update.safetensors"), "--model", str(place / "model"),
            "--scale", "0.25", "--out", str(place / "again"), *more]  # fmt: skip


def test_the_scaled_update_is_added_and_nothing_else(place: Path) -> None:
    done = CliRunner().invoke(app, words(place, "--json"), catch_exceptions=False)
    found = json.loads(done.stdout)
    assert (found["scale"], found["weights"], found["is_start"]) == (0.25, 1, False)
    before, after = (load_file(place / name / "model.safetensors") for name in ("model", "again"))
    assert before.keys() == after.keys()
    torch.testing.assert_close(after[NAME], before[NAME] + 0.25)
    assert all(torch.equal(after[name], one) for name, one in before.items() if name != NAME)
    assert (place / "again" / "tokenizer.json").is_file()


def test_a_folder_that_is_there_is_left_alone(place: Path) -> None:
    (place / "again").mkdir()
    with pytest.raises(UserError, match="already exists"):
        CliRunner().invoke(app, words(place), catch_exceptions=False)
    assert not list((place / "again").iterdir())
