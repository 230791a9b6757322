"""Checkpoints: whole or not there, the newest usable one is taken, old ones go."""

import json
from pathlib import Path
from typing import Any

import pytest

from unlearn.checkpoints import ASIDE, SEAL, begin, choose, clean, go_back, problem, prune, seal
from unlearn.errors import UserError

RECIPE = {"training.learning_rate": 1e-5, "seed": 0, "terms": [{"objective": "npo"}]}


def make(folder: Path, step: int, **changes: Any) -> Path:
    path = folder / f"checkpoint-{step}"
    staging = begin(path)
    (staging / "model").write_bytes(b"weights" * 100)
    (staging / "sub").mkdir()
    (staging / "sub" / "state").write_bytes(b"state")
    (staging / "empty").write_bytes(b"")
    seal(staging, path, RECIPE | changes)
    return path


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


def test_the_seal_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    """SHA-256 of the empty file is e3b0…; the seal does not list itself."""
    path = make(tmp_path, 1)
    content = json.loads((path / SEAL).read_text())
    assert {name: entry["size"] for name, entry in content["files"].items()} == {
        "empty": 0, "model": 700, "sub/state": 5,
    }  # fmt: skip
    assert content["files"]["empty"]["sha256"].startswith("e3b0c44298fc1c14")
    assert content["identity"] == RECIPE
    assert problem(path, RECIPE) is None


def flip(path: Path) -> None:
    data = bytearray((path / "model").read_bytes())
    data[350] ^= 1
    (path / "model").write_bytes(data)


def become_a_folder(path: Path) -> None:
    (path / "model").unlink()
    (path / "model").mkdir()


DAMAGE = {
    "one bit": (flip, "model is damaged: its SHA-256 is not the one it was saved with"),
    "cut file": (
        lambda path: (path / "model").write_bytes(b"weights" * 99),
        "model is truncated: 693 bytes of 700",
    ),
    "longer file": (
        lambda path: (path / "sub" / "state").write_bytes(b"state!"),
        "sub/state has grown: 6 bytes of 5",
    ),
    "missing file": (lambda path: (path / "sub" / "state").unlink(), "sub/state is missing"),
    "missing empty file": (lambda path: (path / "empty").unlink(), "empty is missing"),
    "a folder in place of a file": (become_a_folder, "model is missing"),
    "no seal": (lambda path: (path / SEAL).unlink(), "it has no complete.json: its save never"),
    "empty seal": (lambda path: (path / SEAL).write_text(""), "its complete.json is damaged"),
    "a list for a seal": (lambda path: (path / SEAL).write_text("[]"), "its complete.json is dam"),
    "binary seal": (
        lambda path: (path / SEAL).write_bytes(b"\xff\xfe\x00"),
        "its complete.json is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(damage: str, tmp_path: Path) -> None:
    do, why = DAMAGE[damage]
    make(tmp_path, 3)
    bad = make(tmp_path, 4)
    assert choose(tmp_path, RECIPE) == ("checkpoint-4", [])
    do(bad)
    found, passed = choose(tmp_path, RECIPE)
    assert found == "checkpoint-3"
    assert len(passed) == 1
    assert passed[0].startswith(f"checkpoint-4 is passed over: {why}")
    make(tmp_path, 4)
    assert choose(tmp_path, RECIPE) == ("checkpoint-4", [])


def test_a_checkpoint_of_another_recipe_is_refused_with_the_keys(tmp_path: Path) -> None:
    make(tmp_path, 3)
    other = RECIPE | {"training.learning_rate": 2e-5, "new": "key"}
    with pytest.raises(UserError) as refused:
        choose(tmp_path, other)
    assert (
        "checkpoint-3: it was made with training.learning_rate 1e-05, here 2e-05; "
        'new null, here "key"' in refused.value.message
    )
    assert "starts from its beginning" in refused.value.hint


def test_only_damaged_ones_are_an_error_none_at_all_is_not(tmp_path: Path) -> None:
    assert choose(tmp_path, RECIPE) == (None, [])
    assert choose(tmp_path / "absent", RECIPE) == (None, [])
    flip(make(tmp_path, 1))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used; checkpoint-1: model is"):
        choose(tmp_path, RECIPE)


def test_newest_is_by_number_and_ignores_other_names(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-", "other-200", ".checkpoint-300"):
        (tmp_path / name).mkdir()
    assert choose(tmp_path)[0] == "checkpoint-100"


def test_going_back_sets_newer_ones_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make(tmp_path, step)
    go_back(tmp_path, "checkpoint-4", RECIPE)
    assert steps(tmp_path) == [2, 4]
    assert steps(tmp_path / ASIDE) == [6]
    assert problem(tmp_path / ASIDE / "checkpoint-6") is None


def test_going_back_to_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make(tmp_path, step)
    flip(tmp_path / "checkpoint-4")
    with pytest.raises(UserError) as refused:
        go_back(tmp_path, "checkpoint-4", RECIPE)
    assert "checkpoint-4 cannot be used: model is damaged" in refused.value.message
    assert refused.value.hint == "the newest usable one is checkpoint-6"
    with pytest.raises(UserError) as refused:
        go_back(tmp_path, "checkpoint-5")
    assert refused.value.hint == "there are: checkpoint-6, checkpoint-4, checkpoint-2"
    assert steps(tmp_path) == [2, 4, 6]


def test_a_save_that_never_ended_is_no_checkpoint_and_is_cleaned(tmp_path: Path) -> None:
    good = make(tmp_path, 5)
    (begin(good) / "model").write_bytes(b"half")
    assert choose(tmp_path) == ("checkpoint-5", [])
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [12]),
        (2, None, [9, 12]),
        (9, None, [1, 2, 9, 12]),
        (None, None, [1, 2, 9, 12]),
        (1, 2, [2, 12]),
        (2, 12, [9, 12]),
        (1, 7, [12]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(
    keep: int | None, best: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in (1, 2, 9, 12):
        make(tmp_path, step)
    (tmp_path / "notes").mkdir()
    prune(tmp_path, keep, best=best)
    assert steps(tmp_path) == left
    assert (tmp_path / "notes").is_dir()


def test_prune_never_takes_the_last_good_one_for_a_damaged_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-3" / "model").write_bytes(b"cut")
    prune(tmp_path, 1)
    assert steps(tmp_path) == [2, 3]
    assert choose(tmp_path, RECIPE)[0] == "checkpoint-2"
    prune(tmp_path / "absent", 2)
