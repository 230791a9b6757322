"""``unlearn edit diff`` on two folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from unlearn.cli.main import app
from unlearn.edits.update import load_update
from unlearn.errors import UserError

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def place(tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    model = build_tiny_model().bfloat16()
    for name in ("start", "edited"):
        model.save_pretrained(name)
        tiny_tokenizer.save_pretrained(name)
        model.state_dict()[NAME].mul_(-1.5)
    build_tiny_model(intermediate_size=40).save_pretrained("other")
    return tmp_path


def call(*words: str) -> str:
    done = CliRunner().invoke(app, ["edit", "diff", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_the_update_added_to_the_start_is_the_edited_model(place: Path) -> None:
    found = json.loads(call("start", "edited", "--out", "update.safetensors", "--json"))
    assert (found["weights"], found["of"]) == (1, 21)
    assert found["layers"][0]["relative"] == pytest.approx(2.5, rel=1e-3)
    words = ["reapply", "update.safetensors", "--model", "start", "--scale", "1", "--out", "again"]
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["is_start"]
    again, edited = (load_file(f"{name}/model.safetensors") for name in ("again", "edited"))
    assert again.keys() == edited.keys()
    assert all(bool((one == edited[name].to(one)).all()) for name, one in again.items())


def test_a_table_for_people_fits_the_terminal(place: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = call("start", "edited", "--out", "update.safetensors", "--rank", "2")
    assert max(map(len, text.splitlines())) <= 80
    assert NAME in text
    assert "1 of 21 weights differ" in text
    assert "of rank 2 at most" in text
    assert load_update(Path("update.safetensors")).about["rank"] == 2


def test_mistakes_are_told_before_weights_are_loaded(place: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("unlearn.models.load_model", None)
    Path("there.safetensors").touch()
    for words, message in (
        (
            ("start", "other", "--out", "u.safetensors"),
            r"is \[48, 32\] in the start, \[40, 32\] in",
        ),
        (("start", "gone", "--out", "u.safetensors"), "no model folder 'gone'"),
        (("start", "edited", "--out", "there.safetensors"), "already exists"),
        (("start", "edited", "--out", "update"), "ends in .safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            call(*words)
    assert not Path("u.safetensors").exists()
