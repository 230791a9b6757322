"""Commands that several processes of one launch run together, and starting such a launch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer

from unlearn.cli.entry import FAILED, Halt
from unlearn.launch import MEET_SECONDS, inside_launch, leave, sizes

PATIENCE = timedelta(hours=2)
"""How long one process may wait for another: rank 0 may be saving. A dead one is noticed sooner."""
SEVERAL = "Several processes"
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc", min=1, metavar="N", help="Processes per node.", rich_help_panel=SEVERAL
    ),
]
EngineName = Literal["none", "ddp", "fsdp2", "zero2", "zero3", "zero3-offload"]
Engine = Annotated[
    EngineName | None,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="none, ddp, fsdp2, zero2, zero3 or zero3-offload; see docs/scale.md.",
        rich_help_panel=SEVERAL,
    ),
]
Nnodes = Annotated[
    int | None,
    typer.Option(
        "--nnodes",
        min=1,
        metavar="N",
        help="Nodes; start the same command on each.",
        rich_help_panel=SEVERAL,
    ),
]
Rdzv = Annotated[
    str | None,
    typer.Option(
        "--rdzv", metavar="HOST:PORT", help="Where the nodes meet.", rich_help_panel=SEVERAL
    ),
]


def launch_changes(
    nproc: int | None, engine: str | None, nnodes: int | None, rdzv: str | None
) -> dict[str, Any]:
    """Give the recipe keys that these options change; inside a launch its true size holds."""
    given: dict[str, Any] = {"nproc": nproc, "engine": engine, "nnodes": nnodes, "rdzv": rdzv}
    if inside_launch():
        given["nproc"], given["nnodes"] = sizes()
    changes = {key: value for key, value in given.items() if value is not None}
    return {"launch": changes} if changes else {}


def needs_launch(recipe: Any) -> bool:
    """Tell whether this process must start others to run the recipe."""
    return recipe.launch.chosen != "none" and not inside_launch()


def start_run(recipe: Any, *, offline: bool, json: bool) -> None:
    """Run a resolved recipe in every process that it asks for; exit as the run does."""
    from unlearn.recipes.files import dump
    from unlearn.recipes.inputs import absolute

    with TemporaryDirectory(prefix="unlearn-recipe-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump(absolute(recipe)), encoding="utf-8")
        start(recipe, ["run", str(path)], offline=offline, json=json)


def start(recipe: Any, command: list[str], *, offline: bool, json: bool) -> None:
    """Run a command of ours in every process that the recipe asks for; exit as the run does.

    Raises:
        LaunchEnded: the run did not succeed.
        UserError: the engine cannot work here.
    """
    from unlearn.engines import check_engine, environment
    from unlearn.launch import Launch

    section = recipe.launch
    launch = Launch(section.nproc, section.nnodes, section.rdzv)
    check_engine(section.chosen, section.nproc, quantized=bool(recipe.model.quantize))
    if section.nnodes > 1:
        minutes = MEET_SECONDS // 60
        where = f"{section.nnodes} nodes meet at {section.rdzv}"
        print(f"{where}; this one waits up to {minutes} minutes", file=sys.stderr, flush=True)
    flags = [flag for flag, on in (("--offline", offline), ("--json", json)) if on]
    _start(launch, [*command, *flags], Path(recipe.out), environment(section.chosen))


def started(nproc: int | None, out: Path) -> bool:
    """Run the command as it was typed in ``nproc`` processes; False if this is one of them.

    Also False where one process is wanted: the caller does the work itself.

    Raises:
        LaunchEnded: the command did not succeed.
        UserError: there are fewer devices.
    """
    from unlearn.engines import check_engine
    from unlearn.launch import Launch

    if inside_launch() or (nproc or 1) == 1:
        return False
    check_engine("ddp", nproc or 1)
    _start(Launch(nproc or 1), sys.argv[1:], out, {})
    return True


def _start(launch: Any, words: list[str], out: Path, variables: dict[str, str]) -> None:
    from unlearn.cli.entry import LaunchEnded, stdout_for_children
    from unlearn.launch import start as start_processes
    from unlearn.runs import COMMAND, command_line

    sys.stdout.flush()
    with stdout_for_children():
        outcome = start_processes(launch, words, variables=variables | {COMMAND: command_line()})
    if outcome.code:
        raise LaunchEnded(outcome, out)


@contextmanager
def joined_ranks(engine: EngineName = "none") -> Iterator[bool]:
    """Join the processes of a launch for the block; True for the one that speaks and writes.

    With an ``engine``, one launched process joins too: engines want a process group.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) < 2
    if not inside_launch() or (alone and engine == "none"):
        yield True
        return
    import torch
    from torch import distributed

    from unlearn.engines import environment
    from unlearn.rollcall import answering

    os.environ.update(environment(engine))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        with answering(_end_without):
            yield distributed.get_rank() == 0
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _end_without(message: str) -> None:
    """End this process at once, because another is lost and the main thread may wait for it."""
    if leave(FAILED, message) is None:
        hint = "`unlearn resume RUN` goes on from the last checkpoint"
        print(f"failed: {message}\n  hint: {hint}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def require_one_process(command: str) -> None:
    """Refuse a launch of several processes for a command that would do all the work in each.

    Raises:
        UserError: names the command.
    """
    from unlearn.errors import UserError

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise UserError(f"`{command}` runs in one process, {size} were launched", "start it alone")


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say how a stopped training goes on, when something of it was saved in its folder."""
    from unlearn.errors import Interrupted
    from unlearn.recipes.training_folder import CHECKPOINT

    try:
        yield
    except (Halt, KeyboardInterrupt, Interrupted) as stop:
        if not (out / CHECKPOINT).is_file():
            raise
        hint = f"the same command goes on from what was last saved in '{out}'"
        raise Interrupted(str(stop) or "stopped on request", hint) from stop
