"""Rows on disk: torn, resumed, taken over by another command."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from unlearn.detect.output import check_output, output, part_file, state_file
from unlearn.errors import UserError

KEY = {"model": "m", "k": (0.2,)}


class Killed(BaseException):
    pass


def begin(path: Path) -> None:
    """Write two safe rows and be killed within the third."""
    with suppress(Killed), output(path, KEY) as file:
        file.append([{"id": 0}, {"id": 1}])
        file.file.write(b'{"id": 2, "sco')
        file.file.flush()
        raise Killed


def test_what_is_not_finished_does_not_look_finished(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    assert not path.exists()
    assert part_file(path).exists()


def test_it_goes_on_after_the_last_safe_row(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    assert check_output(path, KEY) == 2
    with output(path, KEY) as file:
        assert file.done == 2
        assert [row["id"] for row in file.rows()] == [0, 1]
        file.append([{"id": 2}])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert sorted(tmp_path.iterdir()) == [path]


def test_another_command_does_not_go_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    with pytest.raises(UserError, match=r"begun with other settings \(k\)"):
        check_output(path, KEY | {"k": (0.4,)})


def test_a_finished_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(UserError, match="is there already"), output(path, KEY):
        pass
    assert path.read_text() == "mine\n"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with output(path, KEY), pytest.raises(UserError, match="being written"), output(path, KEY):
        pass


@pytest.mark.parametrize("damage", ["state lost", "state damaged", "part cut"])
def test_damage_starts_again_instead_of_mixing(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    if damage == "state lost":
        state_file(path).unlink()
    elif damage == "state damaged":
        state_file(path).write_text("{")
    else:
        part_file(path).write_bytes(b'{"id"')
    with output(path, KEY) as file:
        assert file.done == 0
        file.append([{"id": 9}])
    assert path.read_text() == '{"id": 9}\n'


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"), output(tmp_path / "o", KEY) as file:
        file.append([{"x": float("nan")}])
