"""Running the cells of a sweep: one after another in this process, or several at a time in others.

A cell that fails does not stop the others; a stopped sweep goes on where it was.
"""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlearn.errors import Interrupted, RunFailed, UserError
from unlearn.recipes.files import dump
from unlearn.recipes.inputs import absolute
from unlearn.recipes.sweep import Cell
from unlearn.runs import COMMAND, RunFolder, command_line

Emit = Callable[[dict[str, Any]], None]
INTERRUPTED = 75
POLL = 0.2
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``complete``, ``skipped`` (it was complete before) or ``failed``."""

    cell: Cell
    state: str
    message: str = ""


def run_cells(
    cells: Sequence[Cell], *, jobs: int = 1, emit: Emit = lambda event: None, offline: bool = False
) -> list[Outcome]:
    """Bring every cell to its end; complete ones are left alone, begun ones go on.

    With several ``jobs`` each cell is a process of its own, and the threads are divided.

    Raises:
        Interrupted: stopped by SIGINT or SIGTERM; the same call goes on.
    """
    waiting = [cell for cell in cells if cell.state != "complete"]
    alone = jobs == 1 or len(waiting) < 2
    found = (
        _one_by_one(waiting, emit, offline) if alone else _Pool(jobs, emit, offline).run(waiting)
    )
    done = {outcome.cell.name: outcome for outcome in found}
    return [done.get(cell.name, Outcome(cell, "skipped")) for cell in cells]


def _one_by_one(cells: Sequence[Cell], emit: Emit, offline: bool) -> list[Outcome]:
    found = []
    for number, cell in enumerate(cells, start=1):
        emit({"event": "stage", "stage": "cell", "name": f"{number}/{len(cells)} {cell.name}"})
        if cell.recipe.launch.chosen == "none":
            found.append(_here(cell, emit, offline))
        else:
            found += _Pool(1, emit, offline).run([cell])
        gc.collect()
    return found


def _here(cell: Cell, emit: Emit, offline: bool) -> Outcome:
    from unlearn.recipes.run import resume, run  # noqa: PLC0415 - imports torch

    try:
        if cell.state == "begun":
            resume(cell.recipe, cell.folder, emit=emit, offline=offline)
        else:
            _clear(cell.folder)
            run(cell.recipe, emit=emit, offline=offline)
    except (UserError, RunFailed) as error:
        return _failed(cell, error.message, emit)
    except Exception as error:
        with suppress(OSError):
            log = cell.folder.path / "error.log"
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        return _failed(cell, f"{type(error).__name__}: {text}", emit)
    return Outcome(cell, "complete")


def _failed(cell: Cell, message: str, emit: Emit) -> Outcome:
    emit({"event": "warning", "message": f"{cell.name} failed: {message}"})
    return Outcome(cell, "failed", message)


def _clear(folder: RunFolder) -> None:
    """Take away what a run left that was killed before it wrote its recipe: its lock file."""
    if folder.path.is_dir() and {path.name for path in folder.path.iterdir()} <= {".lock"}:
        with folder.locked():
            shutil.rmtree(folder.path)


@dataclass
class _Pool:
    """Several cells at a time, each as the command that a person would type."""

    jobs: int
    emit: Emit
    offline: bool
    running: dict[str, tuple[Cell, subprocess.Popen[bytes]]] = field(default_factory=dict)
    found: list[Outcome] = field(default_factory=list)

    def run(self, cells: Sequence[Cell]) -> list[Outcome]:
        """Start and watch; a stop request is passed on, and the cells end as single runs do."""
        with tempfile.TemporaryDirectory(prefix="unlearn-sweep-") as folder:
            try:
                self._all(cells, Path(folder))
            except BaseException:
                self._stop()
                raise
        if any(outcome.state == "interrupted" for outcome in self.found):
            raise Interrupted("a cell was stopped")
        return self.found

    def _all(self, cells: Sequence[Cell], folder: Path) -> None:
        waiting = list(cells)
        while waiting or self.running:
            while waiting and len(self.running) < self.jobs:
                cell = waiting.pop(0)
                name = f"{len(cells) - len(waiting)}/{len(cells)} {cell.name}"
                self.emit({"event": "stage", "stage": "cell", "name": name})
                self.running[cell.name] = cell, self._start(cell, folder)
            for name, (cell, process) in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    self._ended(cell, process.returncode)
            time.sleep(POLL)

    def _start(self, cell: Cell, folder: Path) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-m", "unlearn.cli"]
        if cell.state == "begun":
            command = [*program, "resume", str(cell.folder.path)]
        else:
            _clear(cell.folder)
            recipe = folder / f"{cell.name}.yaml"
            recipe.write_text(dump(absolute(cell.recipe)), encoding="utf-8")
            command = [*program, "run", str(recipe)]
        log = log_of(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            return subprocess.Popen(
                [*command, *(["--offline"] if self.offline else [])],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
                env=os.environ | {COMMAND: command_line()} | _threads(self.jobs),
            )

    def _ended(self, cell: Cell, code: int) -> None:
        if code == 0:
            self.emit({"event": "cell", "name": cell.name})
            self.found.append(Outcome(cell, "complete"))
        elif code == INTERRUPTED:
            self.found.append(Outcome(cell, "interrupted"))
        else:
            self.found.append(_failed(cell, _cause(log_of(cell), code), self.emit))

    def _stop(self) -> None:
        """Let the running cells save and end; a second request ends them at once."""
        processes = [process for _, process in self.running.values()]
        try:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()
        except BaseException:
            for process in processes:
                process.kill()
            raise


def log_of(cell: Cell) -> Path:
    """Give the file that holds what a cell's own process printed."""
    return cell.folder.path.parent / "logs" / f"{cell.name}.log"


def _threads(jobs: int) -> dict[str, str]:
    """Divide the threads that this process would use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, threads // jobs))}


def _cause(log: Path, code: int) -> str:
    """Find the line in which a command says why it ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        word, colon, text = line.partition(": ")
        if colon and word in ("failed", "error"):
            return text
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}; see {log}"
