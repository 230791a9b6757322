"""Rows on disk while they are being made: what is written is never taken for the whole.

``OUT.part`` holds the rows so far and ``OUT.part.json`` how many of them count and what made them.
The file gets its own name when the last row is in it. The same command goes on where it stopped.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from unlearn.errors import UserError
from unlearn.runs import write_json


class Busy(UserError):
    """Another process is writing the same file."""


@dataclass
class Output:
    """A file of JSON lines that grows block by block; ``done`` rows of it are safe."""

    path: Path
    key: Mapping[str, Any]
    file: IO[bytes]
    done: int = 0

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a block of rows; once this returns they outlive a crash."""
        self.file.write(b"".join(line(row).encode() for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.done += len(rows)
        state = {"rows": self.done, "bytes": self.file.tell(), "made_by": self.key}
        write_json(state_file(self.path), state)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read back what is written so far."""
        with part_file(self.path).open("rb") as file:
            for text in file:
                yield json.loads(text)


@contextmanager
def output(path: Path, key: Mapping[str, Any]) -> Iterator[Output]:
    """Open a file for rows, new or where an earlier try stopped; name it when the block succeeds.

    ``key`` is all that the rows depend on. What follows the last safe row is dropped.

    Raises:
        UserError: the file exists, or was begun by another command.
    """
    check_output(path, key)
    part = part_file(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        _lock(file, path)
        state = _state(path)
        file.truncate(state["bytes"])
        file.seek(state["bytes"])
        yield Output(path, json.loads(json.dumps(key)), file, state["rows"])
    os.replace(part, path)
    state_file(path).unlink(missing_ok=True)


def check_output(path: Path, key: Mapping[str, Any]) -> int:
    """Say how many rows are there already; call it before any long work.

    Raises:
        UserError: the file exists, or was begun by another command.
    """
    check_absent(path)
    state = _state(path)
    if state["rows"] and (changed := _changed(state["made_by"], json.loads(json.dumps(key)))):
        raise UserError(
            f"'{part_file(path)}' was begun with other settings ({changed})",
            "give the command that began it, or remove it, or choose another --out",
        )
    return int(state["rows"])


def check_absent(path: Path) -> None:
    """Refuse a file that is there: under its own name it is complete."""
    if path.exists():
        raise UserError(
            f"'{path}' is there already, and complete: an unfinished one is called "
            f"'{part_file(path).name}'",
            "choose another --out, or remove it",
        )


def line(row: Mapping[str, Any]) -> str:
    """Write one row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def part_file(path: Path) -> Path:
    """Name the file that holds the rows before they are all there."""
    return path.with_name(f"{path.name}.part")


def state_file(path: Path) -> Path:
    """Name the file that says how much of the former counts."""
    return path.with_name(f"{path.name}.part.json")


def _state(path: Path) -> dict[str, Any]:
    empty = {"rows": 0, "bytes": 0, "made_by": {}}
    file = state_file(path)
    if not file.is_file() or not part_file(path).is_file():
        return empty
    try:
        state: dict[str, Any] = json.loads(file.read_bytes())
        whole = part_file(path).stat().st_size >= state["bytes"]
    except (ValueError, KeyError, TypeError):
        return empty
    return state if whole else empty


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(names)


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy(f"'{path}' is being written by another process", "wait for it") from error
