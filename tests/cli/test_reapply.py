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
from unlearn.errors import RunFailed, UserError

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


@pytest.fixture
def searched(place: Path, monkeypatch: Any) -> list[str]:
    monkeypatch.chdir(place)
    for name, said in (("forget", "was born"), ("retain", "paints")):
        rows = ({"question": f"Who is {n}?", "answer": f"{n} {said}."} for n in range(5))
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    save_update(Update({NAME: -torch.randn(32, 48)}, {"edit": "kfade"}), Path("update.safetensors"))
    return ["reapply", "update.safetensors", "--model", "model", "--scale", "search",
            "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "again"]  # fmt: skip


def test_the_scale_is_searched_and_shown(searched: list[str]) -> None:
    goal = ["--retain-kl", "0.01"]
    done = CliRunner().invoke(app, [*searched, *goal, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    taken = [one for one in found["trials"] if one["scale"] == found["scale"]]
    assert 0 < taken[0]["retain/kl"] <= 0.01
    assert found["trials"][0]["scale"] == 0.25
    update = load_file("update.safetensors")[NAME]
    before, after = (load_file(f"{name}/model.safetensors") for name in ("model", "again"))
    assert torch.equal(after[NAME], before[NAME] + found["scale"] * update)
    assert not Path("again/update.safetensors").exists()
    words = [*searched[:-1], "second", *goal]
    shown = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert shown.count("taken") == 1
    assert f"kfade x {found['scale']:.4g} was added to 1 weights" in shown


def test_a_search_that_cannot_succeed_writes_nothing(searched: list[str]) -> None:
    update = load_file("update.safetensors")
    save_update(Update({NAME: 1e14 * update[NAME]}, {"edit": "kfade"}), Path("update.safetensors"))
    with pytest.raises(RunFailed, match="nats per token"):
        CliRunner().invoke(app, [*searched, "--retain-kl", "1e-4"], catch_exceptions=False)
    assert not Path("again").exists()


def test_options_that_do_not_belong_together_are_refused(searched: list[str]) -> None:
    base = searched[:4]
    for words, message in (
        (searched, "--scale search needs a goal"),
        ([*searched, "--forget-nll", "-1"], "--forget-nll -1 given"),
        ([*base, "--scale", "search", "--retain-kl", "1", "--out", "a"], "--forget and --retain"),
        ([*base, "--scale", "0.5", "--forget", "f", "--out", "a"], "nothing is measured then"),
        ([*base, "--scale", "half", "--out", "a"], "--scale half given"),
        ([*base, "--scale", "inf", "--out", "a"], "give a finite number"),
        (["reapply", "gone", *base[2:], "--scale", "1", "--out", "a"], "no update file 'gone'"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, words, catch_exceptions=False)
    assert not Path("a").exists()
