"""The run folder: what fails leaves nothing, what is there is whole, and one writer at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unlearn import runs
from unlearn.errors import UserError
from unlearn.runs import RunFolder, cache_folder, staged, write_atomic, write_json


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def python(code: str, *arguments: Any) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


# Files


@pytest.mark.parametrize("content", ["größe\n", b"\x00\xff", ""])
def test_write_atomic_writes_what_it_is_given(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_atomic(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert mode(path) == 0o644
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(type(error)):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path: Path) -> None:
    """A real short write: the process may write 1000 bytes per file."""
    code = """
import resource, sys
from pathlib import Path
from unlearn.runs import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), "x" * 5000)
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run(python(code, tmp_path / "file"), capture_output=True, text=True)
    assert done.stdout.strip() == os.strerror(errno.EFBIG)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_json_is_refused_and_the_old_file_stays(number: float, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"größe": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": number})
    assert json.loads(path.read_text()) == {"größe": 1}
    assert names(tmp_path) == ["results.json"]


# Folders


def test_a_staged_folder_appears_whole_and_readable_by_others(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "model"
    with staged(folder) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "weights").write_text("1")
        (staging / "sub" / "weights").chmod(0o600)
        assert not folder.exists()
    assert names(tmp_path / "runs") == ["model", "model/sub", "model/sub/weights"]
    assert mode(folder / "sub" / "weights") == 0o644
    assert mode(folder) == 0o755


def test_a_staged_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for name in ("old", "new"):
        with staged(folder) as staging:
            (staging / name).write_text(name)
            if name == "new":
                assert names(folder) == ["old"]
    assert names(tmp_path) == ["model", "model/new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failing_block_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "model") as staging:
            (staging / "half").write_text("…")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_a_failing_rename_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="broken"), staged(tmp_path / "model") as staging:
        (staging / "whole").write_text("1")
    assert names(tmp_path) == []


# The run folder


def test_create_makes_the_folder_and_takes_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    assert RunFolder.create(path).path == path
    assert RunFolder.create(path).path.is_dir()


def test_create_refuses_what_is_in_use(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    for path, hint in ((tmp_path, "choose"), (file, "choose"), (tmp_path / "run", "resume")):
        with pytest.raises(UserError, match="already exists") as caught:
            RunFolder.create(path)
        assert hint in caught.value.hint
    with pytest.raises(UserError, match="cannot make"):
        RunFolder.create(file / "below")


def test_open_needs_a_recipe(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"no recipe\.yaml"):
            RunFolder.open(path)
    (tmp_path / "recipe.yaml").write_text("")
    assert RunFolder.open(tmp_path).recipe == tmp_path / "recipe.yaml"


# Events


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def test_events_come_back_by_kind_and_in_order(folder: RunFolder) -> None:
    assert folder.events("step") == []
    for number in (1, 2):
        folder.append_event({"event": "step", "step": number})
        folder.append_event({"event": "stage", "stage": "train"})
    assert [event["step"] for event in folder.events("step")] == [1, 2]
    assert all(event["time"] > 1.7e9 for event in folder.events("step"))
    assert len((folder.path / "events.jsonl").read_text().splitlines()) == 4


def test_line_separators_inside_a_text_do_not_break_a_line(folder: RunFolder) -> None:
    text = "a\u2028b\u0085c\nd"
    folder.append_event({"event": "note", "text": text})
    assert [event["text"] for event in folder.events("note")] == [text]


@pytest.mark.parametrize("left", [1, 20, 60, -2, -1])
def test_a_torn_last_line_costs_only_itself(left: int, folder: RunFolder) -> None:
    """Cut anywhere, also inside a character of two bytes; the next event starts a new line."""
    path = folder.path / "events.jsonl"
    folder.append_event({"event": "step", "step": 1})
    kept = path.stat().st_size
    folder.append_event({"event": "step", "step": 2, "text": "größer" * 5 + "ö"})
    whole = path.read_bytes()
    cut = whole[: kept + left] if left > 0 else whole[:-1][: left - 3]
    path.write_bytes(cut)
    assert [event["step"] for event in folder.events("step")] == [1]
    folder.append_event({"event": "step", "step": 3})
    folder.append_event({"event": "step", "step": 4})
    assert [event["step"] for event in folder.events("step")] == [1, 3, 4]


# The lock

HOLD = """
import sys, time
from pathlib import Path
from unlearn.runs import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_ends(folder: RunFolder) -> None:
    holder = subprocess.Popen(python(HOLD, folder.path), stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"by process {holder.pid} on "), folder.locked():
            pytest.fail("two writers")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with folder.locked():
            assert f"process {os.getpid()} on " in (folder.path / ".lock").read_text()
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_falls_after_an_error(folder: RunFolder) -> None:
    with pytest.raises(RuntimeError), folder.locked():
        raise RuntimeError
    with folder.locked():
        pass


# Provenance


def test_the_cache_can_be_put_elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("UNLEARN_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "unlearn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "unlearn"


@pytest.mark.parametrize("program", ["/usr/bin/unlearn", "/site/unlearn/cli/__main__.py"])
def test_the_command_line_can_be_pasted_back(monkeypatch: Any, program: str) -> None:
    monkeypatch.setattr(sys, "argv", [program, "run", "npo", "--forget", "a b#c:d[:4]"])
    assert runs.command_line() == "unlearn run npo --forget 'a b#c:d[:4]'"


def test_versions_are_those_that_are_imported() -> None:
    import torch
    import transformers

    import unlearn

    found = runs.versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["unlearn"] == unlearn.__version__
