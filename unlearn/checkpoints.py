"""Checkpoints that are complete or do not count.

A checkpoint is filled in a staging folder, listed in ``complete.json`` with the size and SHA-256 of
every file, and renamed into place. Resuming takes the newest one that still matches its list.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearn.runs import settle, write_json

SEAL = "complete.json"


def begin(folder: Path) -> Path:
    """Make the staging folder of a checkpoint; :func:`seal` turns it into ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))


def seal(staging: Path, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
    """List the files of a filled staging folder, flush them and rename it to ``folder``."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    entries = {str(path.relative_to(staging)): _entry(path) for path in files}
    write_json(staging / SEAL, entries)
    settle(staging, folder)


def is_complete(folder: Path) -> bool:
    """Tell whether every listed file is there, can be read, and has its size and SHA-256."""
    try:
        entries = json.loads((folder / SEAL).read_text())
        return all(_entry(folder / name) == entry for name, entry in entries.items())
    except (OSError, ValueError):
        return False


def newest(folder: Path) -> Path | None:
    """Give the newest complete checkpoint of a run, or None."""
    return next((path for path in _by_step(folder) if is_complete(path)), None)


def passed_over(folder: Path, last: Path | None) -> list[str]:
    """Name the checkpoints newer than ``last``, the one :func:`newest` gave: they are damaged."""
    names = [path.name for path in _by_step(folder)]
    return names[: names.index(last.name)] if last else names


def prune(folder: Path, keep: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what interrupted saves left behind."""
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in _by_step(folder)[keep:] if keep else []:
        shutil.rmtree(path, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
