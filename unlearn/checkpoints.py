"""Checkpoints that are complete or do not count.

A checkpoint is filled in a staging folder, listed in ``complete.json`` with the size and SHA-256 of
every file and with what its training depends on, flushed and renamed into place. Resuming takes the
newest one that still matches its list and belongs to the same recipe.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.runs import settle, write_json

SEAL = "complete.json"
ASIDE = "set-aside"
"""Folder for checkpoints newer than the one a run was told to go on from."""

Identity = Mapping[str, Any]
"""What a training depends on, by recipe key: plain JSON values."""


def begin(folder: Path) -> Path:
    """Make the staging folder of a checkpoint; :func:`seal` turns it into ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))


def seal(staging: Path, folder: Path, identity: Identity | None = None) -> None:
    """List the files of a filled staging folder, flush them and rename it to ``folder``."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    entries = {str(path.relative_to(staging)): _entry(path) for path in files}
    write_json(staging / SEAL, {"identity": dict(identity or {}), "files": entries})
    settle(staging, folder)


def problem(folder: Path, identity: Identity | None = None, *, thorough: bool = True) -> str | None:
    """Say why a checkpoint cannot be used; None when it can.

    ``thorough=False`` compares sizes and reads no file: for checkpoints this process has written.
    """
    if not (folder / SEAL).is_file():
        return f"it has no {SEAL}: its save never ended"
    try:
        content = json.loads((folder / SEAL).read_text())
        files, stored = dict(content["files"]), dict(content["identity"])
    except (OSError, ValueError, LookupError, TypeError):
        return f"its {SEAL} is damaged"
    if identity is not None and (why := differences(stored, identity)):
        return f"it was made with {why}"
    for name, entry in files.items():
        if found := _file_problem(folder / name, entry, thorough=thorough):
            return f"{name} {found}"
    return None


def _file_problem(path: Path, entry: Mapping[str, Any], *, thorough: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        how = "is truncated" if size < entry["size"] else "has grown"
        return f"{how}: {size} bytes of {entry['size']}"
    try:
        if thorough and _entry(path) != entry:
            return "is damaged: its SHA-256 is not the one it was saved with"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def differences(stored: Identity, wanted: Identity, *, most: int = 3) -> str:
    """Name the keys in which a checkpoint's recipe is another; empty when there are none."""
    keys = [key for key in wanted if key in stored and stored[key] != wanted[key]]
    keys += [key for key in wanted if key not in stored]
    parts = [f"{key} {_short(stored.get(key))}, here {_short(wanted[key])}" for key in keys[:most]]
    more = f" and {len(keys) - most} more differences" if len(keys) > most else ""
    return "; ".join(parts) + more


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"


def choose(folder: Path, identity: Identity | None = None) -> tuple[str | None, list[str]]:
    """Give the name of the newest usable checkpoint, and why newer ones are passed over.

    None when there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, but none can be used.
    """
    passed: list[str] = []
    for path in _by_step(folder):
        why = problem(path, identity)
        if why is None:
            return path.name, passed
        passed.append(f"{path.name} is passed over: {why}")
    if passed:
        first = passed[0].replace(" is passed over:", ":")
        raise UserError(
            f"no checkpoint in '{folder}' can be used; {first}",
            "restore what was changed; or remove that folder, and the run starts from its "
            "beginning",
        )
    return None, []


def go_back(folder: Path, name: str, identity: Identity | None = None) -> None:
    """Make ``name`` the newest checkpoint; newer ones are set aside, nothing is deleted.

    Raises:
        UserError: there is none of that name, or it cannot be used.
    """
    names = [path.name for path in _by_step(folder)]
    if name not in names:
        raise UserError(
            f"no checkpoint '{name}' in '{folder}'", f"there are: {', '.join(names) or 'none'}"
        )
    if why := problem(folder / name, identity):
        good = (other for other in names if other != name and not problem(folder / other, identity))
        other = next(good, None)
        hint = f"the newest usable one is {other}" if other else "no other one can be used either"
        raise UserError(f"{name} cannot be used: {why}", hint)
    for newer in names[: names.index(name)]:
        (folder / ASIDE).mkdir(exist_ok=True)
        shutil.rmtree(folder / ASIDE / newer, ignore_errors=True)
        (folder / newer).rename(folder / ASIDE / newer)


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints of a training stay: the newest ``newest`` (None: all), and the best step's.

    ``identity`` is what they are of.
    """

    newest: int | None = 2
    identity: Identity | None = None
    best_step: Callable[[], int | None] = lambda: None


def prune(folder: Path, keep: int | None, *, best: int | None = None) -> None:
    """Delete all but the newest ``keep`` whole checkpoints and the one of step ``best``.

    Whether one is whole is judged by the sizes of its files: reading them all at every save would
    cost as much as saving. One that is not does not count, so the last good one never goes.
    """
    whole = [path for path in _by_step(folder) if problem(path, thorough=False) is None]
    if keep is None or len(whole) <= keep:
        return
    for path in _by_step(folder):
        old = _step(path) < _step(whole[keep - 1])
        if old and _step(path) != best:
            shutil.rmtree(path, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what interrupted saves left behind; only for the holder of the run folder."""
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
