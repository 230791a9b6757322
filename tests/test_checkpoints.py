"""Checkpoints: whole or not there, the newest whole one is taken, old ones go."""

import json
from pathlib import Path

import pytest

from unlearn.checkpoints import SEAL, is_complete, newest, passed_over, prune, sealed


def make(folder: Path, step: int, content: bytes = b"weights" * 100) -> Path:
    path = folder / f"checkpoint-{step}"
    with sealed(path) as staging:
        (staging / "model").write_bytes(content)
        (staging / "sub").mkdir()
        (staging / "sub" / "state").write_bytes(b"state")
        (staging / "empty").write_bytes(b"")
    return path


def make_half(path: Path, error: BaseException) -> None:
    with sealed(path) as staging:
        (staging / "model").write_bytes(b"half")
        raise error


def test_the_seal_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    """SHA-256 of the empty file is e3b0…; the seal does not list itself."""
    path = make(tmp_path, 1)
    entries = json.loads((path / SEAL).read_text())
    assert {name: entry["size"] for name, entry in entries.items()} == {
        "empty": 0, "model": 700, "sub/state": 5,
    }  # fmt: skip
    assert entries["empty"]["sha256"].startswith("e3b0c44298fc1c14")
    assert is_complete(path)


def flip(path: Path) -> None:
    data = bytearray((path / "model").read_bytes())
    data[350] ^= 1
    (path / "model").write_bytes(data)


def become_a_folder(path: Path) -> None:
    (path / "model").unlink()
    (path / "model").mkdir()


DAMAGE = {
    "one bit": flip,
    "cut file": lambda path: (path / "model").write_bytes(b"weights" * 99),
    "longer file": lambda path: (path / "sub" / "state").write_bytes(b"state!"),
    "missing file": lambda path: (path / "sub" / "state").unlink(),
    "missing empty file": lambda path: (path / "empty").unlink(),
    "a folder in place of a file": become_a_folder,
    "no seal": lambda path: (path / SEAL).unlink(),
    "empty seal": lambda path: (path / SEAL).write_text(""),
    "cut seal": lambda path: (path / SEAL).write_bytes((path / SEAL).read_bytes()[:-20]),
    "binary seal": lambda path: (path / SEAL).write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_not_taken(damage: str, tmp_path: Path) -> None:
    good, bad = make(tmp_path, 3), make(tmp_path, 4)
    assert newest(tmp_path) == bad
    DAMAGE[damage](bad)
    assert not is_complete(bad)
    assert newest(tmp_path) == good
    make(tmp_path, 4)
    assert newest(tmp_path) == bad


def test_newer_checkpoints_that_are_passed_over_are_named(tmp_path: Path) -> None:
    first = make(tmp_path, 1)
    for step in (2, 3):
        flip(make(tmp_path, step))
    assert passed_over(tmp_path, newest(tmp_path)) == ["checkpoint-3", "checkpoint-2"]
    flip(first)
    assert passed_over(tmp_path, newest(tmp_path)) == [
        "checkpoint-3",
        "checkpoint-2",
        "checkpoint-1",
    ]
    assert passed_over(tmp_path / "absent", newest(tmp_path / "absent")) == []


def test_newest_is_by_number_and_ignores_other_names(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-", "other-200", ".checkpoint-300"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoint-100"


def test_no_checkpoint_no_folder(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    prune(tmp_path / "absent", 2)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_half(tmp_path / "checkpoint-5", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_keeps_the_whole_one_of_the_same_name(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    with pytest.raises(OSError, match="full"):
        make_half(path, OSError("full"))
    assert is_complete(path)


@pytest.mark.parametrize(("keep", "left"), [(1, [12]), (2, [9, 12]), (9, [1, 2, 9, 12]),
                                            (None, [1, 2, 9, 12])])  # fmt: skip
def test_prune_keeps_the_newest(keep: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 9, 12):
        make(tmp_path, step)
    (tmp_path / ".checkpoint-12.a1b2").mkdir()
    (tmp_path / ".checkpoint-12.a1b2" / "half").write_text("…")
    (tmp_path / "notes").mkdir()
    prune(tmp_path, keep)
    steps = sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))
    assert steps == left
    assert sorted(p.name for p in tmp_path.iterdir() if "checkpoint-" not in p.name) == ["notes"]
    assert not list(tmp_path.glob(".*"))
    assert newest(tmp_path) == tmp_path / "checkpoint-12"
