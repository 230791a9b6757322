"""Two sides of a benchmark in processes of their own, which work in turn.

A benchmark starts itself again once per side (``--worker NAME SIDE``). Each side says a line when
it has loaded everything, and one after every piece of work it is told to do: what else the machine
does in the meantime then reaches both sides alike.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Worker = subprocess.Popen[str]
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Lets a worker's allocator give freed blocks back at once, so that its size is what it holds."""


@contextmanager
def worker(
    program: str, arguments: Sequence[str], name: str, side: str, **environment: str
) -> Iterator[Worker]:
    """Start one side of a program; it is ended with the block."""
    command = [sys.executable, program, *arguments, "--worker", name, side]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=os.environ | environment, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(process: Worker, word: str = "") -> Any:
    """Give a worker a word and wait for what it says; the program ends when the worker has."""
    assert process.stdin is not None
    assert process.stdout is not None
    if word:
        print(word, file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith("{"):  # libraries print lines of their own
            return json.loads(line)
    sys.exit(f"a worker ended with code {process.wait()}")


def in_turn(workers: Mapping[str, Worker], times: int) -> list[dict[str, Any]]:
    """Let each worker load, then do ``times`` pieces of work in turn; give all they said."""
    for process in workers.values():
        said(process)
    return [{side: said(one, "go") for side, one in workers.items()} for _ in range(times)]


def answer(lines: Iterable[Mapping[str, Any]]) -> None:
    """Be a worker: say each line and wait for a word before the next."""
    for line in lines:
        tell(line)


def tell(line: Mapping[str, Any]) -> None:
    """Say one line and wait for a word."""
    print(json.dumps(line), flush=True)
    sys.stdin.readline()


def resident(what: str = "VmRSS") -> int:
    """Read a resident size of this process from the system, in bytes: ``VmRSS`` or ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{what}:")]
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Let the peak resident size (``VmHWM``) begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
