"""The run folder: the one place a run lives. Nothing half-written looks finished.

Every file is written beside its place, flushed to disk and renamed. ``results.json`` comes last.
"""

import fcntl
import json
import os
import platform
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from unlearn.errors import UserError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def cache_folder() -> Path:
    """Give the folder for things that can be computed again (``UNLEARN_CACHE`` overrides it)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unlearn"
    return Path(os.environ.get("UNLEARN_CACHE") or default)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all: temporary file, flush to disk, rename."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        _settle(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Write tensors and their metadata as safetensors, completely or not at all."""
    from safetensors.torch import save_file  # noqa: PLC0415 - brings torch, most callers do without

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        staged = Path(folder) / "tensors"
        save_file(dict(tensors), staged, dict(about))
        staged.chmod(0o644)
        _flush(staged)
        os.replace(staged, path)
    _settle(path.parent)


@contextmanager
def open_tensors(
    path: Path, form: str, what: str, hint: str, *, device: Any = "cpu"
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open what :func:`write_tensors` has written; give the open file and its metadata.

    ``form`` is the metadata's ``format``, ``what`` names its content in messages.

    Raises:
        UserError: the file cannot be read, or is of another format.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - most callers do without

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = file.metadata() or {}
            if about.get("format") != form:
                raise UserError(f"'{path}' holds no {what}", hint)
            yield file, about
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read '{path}': {error}", hint) from error


def contents(file: Any) -> dict[str, Any]:
    """Read all tensors of an open file."""
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused rather than written as non-JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Fill a folder under another name; it takes its own name only when the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        settle(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def settle(staging: Path, folder: Path) -> None:
    """Flush all files of a staging folder to disk, then give it its own name."""
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # some writers leave files readable by their owner alone
            _flush(path)
    os.chmod(staging, 0o755)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(staging, folder)
    _settle(folder.parent)


def _settle(folder: Path) -> None:
    """Flush a folder's list of names, so that a rename outlives a power loss."""
    with suppress(OSError):  # some file systems cannot flush a folder
        _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RunFolder:
    """Paths and writing rules of one run."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Make a new run folder; refuse one that has something in it.

        Raises:
            UserError: the folder exists and is not empty, or cannot be made.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            resumable = (path / "recipe.yaml").is_file() and not cls(path).results.is_file()
            then = f"`unlearn resume {path}` continues it, or " if resumable else ""
            raise UserError(f"output folder '{path}' already exists", f"{then}choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make '{path}': {error.strerror}", "choose another --out"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run folder.

        Raises:
            UserError: it is not a run folder.
        """
        if not (path / "recipe.yaml").is_file():
            raise UserError(
                f"'{path}' is not a run folder: it has no recipe.yaml", "give the --out of a run"
            )
        return cls(path)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def update(self) -> Path:
        """What an edit has added to the weights, when the run trained nothing."""
        return self.path / "update.safetensors"

    @property
    def edit_steps(self) -> Path:
        """The steps that an edit has taken so far; gone once it is done."""
        return self.path / "edit-steps.safetensors"

    @property
    def selection(self) -> Path:
        """The rows trained on and every row's score, when a part of the forget set was chosen."""
        return self.path / "selection.json"

    @property
    def best(self) -> Path:
        """The trained weights of the best of the measured steps, when one is to be selected."""
        return self.path / "best"

    @property
    def results(self) -> Path:
        """The last file to be written: it exists when and only when the run is complete."""
        return self.path / "results.json"

    def evaluation(self, name: str) -> Path:
        return self.path / "evals" / f"{name}.json"

    def steps(self) -> list[Path]:
        """List the evaluations made during training."""
        return list((self.path / "evals").glob("step-*.json"))

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Append one line to ``events.jsonl``; a torn last line is closed first."""
        line = json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False)
        with (self.path / "events.jsonl").open("ab+") as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * torn + line.encode() + b"\n")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Read back the events of one kind; a torn last line (power loss) is skipped."""
        path = self.path / "events.jsonl"
        found = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == kind:
                found.append(event)
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second writer; the lock falls when the process ends.

        Raises:
            UserError: another process is writing here.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UserError(
                    f"'{self.path}' is being written by {owner}", "wait for it to end"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield


def versions() -> dict[str, str]:
    """Give the versions of everything that can change a number."""
    found = {"unlearn": metadata.version("unlearn-llm"), "python": platform.python_version()}
    for name in PACKAGES:
        found[name] = metadata.version(name)
    return found


COMMAND = "UNLEARN_COMMAND"
"""Variable that tells launched processes the command a person typed."""


def command_line() -> str:
    """Give the command this process was started with, as one would type it again."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "unlearn")  # python -m unlearn.cli
    return os.environ.get(COMMAND) or shlex.join([program, *sys.argv[1:]])
