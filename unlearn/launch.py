"""Starting the processes of a run, on one node or several, and learning how each of them ended.

torch.distributed.run starts and watches them. Ours to add: a stop request reaches every process
once and leaves it the time to save; how each process ended is kept in a file, so that the one that
failed first is named and the exit code is that of the run.
"""

import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unlearn.errors import RunFailed, UserError

FOLDER = "UNLEARN_LAUNCH_FOLDER"
"""Variable that names the folder where processes started here say how they ended."""
PROGRAM = ("-m", "unlearn.cli")
END_SECONDS = 10
"""How long the others may take to end once a process has failed; then they are killed."""
MEET_SECONDS = 900
"""How long a node waits for the others: they may be started by hand, or fetch an image first."""
SAME_REQUEST = 2.0
"""SIGTERMs within so many seconds are one request: schedulers send it to all processes at once."""
RUN_ID = "unlearn"
MEETING_HINT = "start the same command on each; all must reach that host and port"
CLEAN = (0, 75)
"""Exit codes after which the other processes are left to end by themselves."""


@dataclass(frozen=True)
class Launch:
    """How many processes, on how many nodes, and where the nodes meet (HOST:PORT)."""

    nproc: int = 1
    nnodes: int = 1
    rdzv: str | None = None

    def __post_init__(self) -> None:
        if self.nnodes > 1 and not self.rdzv:
            raise UserError(
                f"{self.nnodes} nodes given, but not where they meet",
                "add --rdzv HOST:PORT, with the name of one of the nodes and a free port there",
            )


@dataclass(frozen=True)
class Outcome:
    """How one process ended: exit code, cause and what to do, and when (seconds since 1970)."""

    rank: int
    host: str
    pid: int
    code: int = 0
    message: str = ""
    hint: str = ""
    time: float = 0.0


def inside_launch() -> bool:
    """Tell whether this process is one of a launch: ours, torchrun's or Accelerate's."""
    return "LOCAL_RANK" in os.environ


def rank() -> int:
    """Give this process's place among all of the launch; 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def sizes() -> tuple[int, int]:
    """Give processes per node and nodes of the launch that this process belongs to."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return here, processes // here


def enter() -> None:
    """Tell the launcher that this process can be asked to stop."""
    if folder := os.environ.get(FOLDER):
        (Path(folder) / f"pid-{rank()}").write_text(str(os.getpid()))


def leave(code: int, message: str = "", hint: str = "") -> int | None:
    """Tell the launcher how this process ends; give the code to exit with, None without launcher.

    A clean end exits with 0 whatever its code: any other code would make the others be killed.
    """
    if not (folder := os.environ.get(FOLDER)):
        return None
    outcome = Outcome(rank(), socket.gethostname(), os.getpid(), code, message, hint, time.time())
    place = Path(folder) / f"rank-{rank()}.json"
    with suppress(OSError):  # the launcher is gone
        place.with_suffix(".part").write_text(json.dumps(asdict(outcome)))
        place.with_suffix(".part").rename(place)
    return 0 if code in CLEAN else code


def start(
    launch: Launch,
    arguments: Sequence[str],
    *,
    program: Sequence[str] = PROGRAM,
    variables: Mapping[str, str] | None = None,
) -> Outcome:
    """Run ``python PROGRAM ARGUMENTS`` in every process and give the outcome of the whole.

    SIGINT and SIGTERM are passed on once, as SIGTERM; a second one ends everything at once.

    Raises:
        RunFailed: the nodes did not meet.
    """
    from torch.distributed.elastic.multiprocessing.errors import (  # noqa: PLC0415 - imports torch
        ChildFailedError,
    )
    from torch.distributed.elastic.rendezvous import RendezvousError  # noqa: PLC0415
    from torch.distributed.launcher.api import elastic_launch  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="unlearn-launch-") as name:
        folder, failures = Path(name), {}
        settings = {FOLDER: name, "OMP_NUM_THREADS": str(_threads(launch.nproc))}
        settings |= variables or {}
        with _variables(settings), _passing_on(folder, launch.nproc), _ending(folder):
            try:
                elastic_launch(_config(launch), sys.executable)(*program, *arguments)
            except ChildFailedError as error:
                failures = error.failures
            except RendezvousError as error:
                where = f"{launch.nnodes} nodes did not meet at {launch.rdzv}"
                raise RunFailed(where, MEETING_HINT) from error
        return _whole(list(outcomes(folder)), failures)


def _threads(nproc: int) -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // nproc)


def _config(launch: Launch) -> Any:
    from torch.distributed.launcher.api import LaunchConfig  # noqa: PLC0415 - imports torch

    alone = launch.nnodes == 1
    return LaunchConfig(
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        nproc_per_node=launch.nproc,
        run_id=f"{RUN_ID}-{os.getpid()}" if alone else RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0" if alone else str(launch.rdzv),
        rdzv_configs={"join_timeout": MEET_SECONDS, "read_timeout": MEET_SECONDS},
        local_addr="localhost" if alone else None,
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # the others are passed on by _passing_on
        shutdown_timeout=END_SECONDS,
    )


def outcomes(folder: Path) -> Iterator[Outcome]:
    """Read how the processes of this node ended, those that said so."""
    for path in sorted(folder.glob("rank-*.json")):
        yield Outcome(**json.loads(path.read_text()))


def _whole(found: Sequence[Outcome], failures: Mapping[int, Any]) -> Outcome:
    """Give the outcome of the launch: its first failure, else a stop, else success."""
    told = {outcome.rank for outcome in found}
    lost = [_lost(rank, one) for rank, one in failures.items() if rank not in told]
    failed = [outcome for outcome in found if outcome.code not in CLEAN]
    first = min((outcome.time for outcome in failed), default=math.inf)
    own = [one for one in lost if "SIGTERM" not in one.message]  # the others were ended by us
    # what waited for a killed process fails just after it; what was killed later, was killed by us
    killed = [one for one in own if "killed by" in one.message and one.time <= first + 5]
    if causes := killed or failed or own:
        return min(causes, key=lambda outcome: (outcome.code != 2, outcome.time))
    return max([*lost, *found], key=lambda outcome: outcome.code)


def _lost(rank: int, failure: Any) -> Outcome:
    how = f"ended with code {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
    host = socket.gethostname()
    hint = "the others were ended; memory that ran out kills like this (see `dmesg`)"
    message = f"rank {rank} (process {failure.pid} on {host}) {how}"
    return Outcome(rank, host, failure.pid, 1, message, hint, failure.timestamp)


@contextmanager
def _variables(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside the block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _passing_on(folder: Path, nproc: int) -> Iterator[None]:
    """Pass the first SIGINT or SIGTERM on to all processes; leave a second one to who had it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Callable[..., Any] | int | None] = {}
    asked: list[float] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        if len(asked) > 1:
            if number == signal.SIGTERM and asked[-1] - asked[0] < SAME_REQUEST:
                return
            restore()
            signal.raise_signal(number)
        pids = [int(path.read_text() or 0) for path in folder.glob("pid-*")]
        if len(pids) < nproc or not all(pids):  # still starting: nothing to be saved
            restore()
            signal.raise_signal(number)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    logging.disable(logging.CRITICAL)  # the agent reports what we report ourselves
    before.update({number: signal.signal(number, stop) for number in numbers})
    try:
        yield
    finally:
        restore()
        logging.disable(logging.NOTSET)


@contextmanager
def _ending(folder: Path) -> Iterator[None]:
    """Kill what still runs some time after a process has failed: it may be frozen."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            failed = [one.time for one in outcomes(folder) if one.code not in CLEAN]
            if failed and time.time() > min(failed) + END_SECONDS:
                for path in folder.glob("pid-*"):
                    with suppress(ProcessLookupError):
                        os.kill(int(path.read_text()), signal.SIGKILL)
                return

    thread = threading.Thread(target=watch, name="ending", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
