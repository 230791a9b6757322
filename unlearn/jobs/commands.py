"""What to type on each node when there is no scheduler."""

from collections.abc import Sequence

from unlearn.launch import RUN_ID, Launch


def node_commands(launch: Launch, arguments: Sequence[str]) -> list[dict[str, list[str]]]:
    """Give the words to type on each node: the command of ours, and the same through torchrun.

    ``arguments`` are those of ``unlearn run`` without nodes, processes and meeting place. The nodes
    are numbered by where they meet, not by the command, so it is the same on all of them. One
    process needs no torchrun.
    """
    ours = ["unlearn", "run", *arguments, *_ours(launch)]
    commands = {"unlearn": ours}
    if launch.nnodes * launch.nproc > 1:
        module = ["-m", "unlearn.cli", "run", *arguments]
        commands["torchrun"] = ["torchrun", *_torchrun(launch), *module]
    return [commands] * launch.nnodes


def _ours(launch: Launch) -> list[str]:
    words = ["--nnodes", str(launch.nnodes)] if launch.nnodes > 1 else []
    words += ["--nproc", str(launch.nproc)] if launch.nnodes * launch.nproc > 1 else []
    return words + (["--rdzv", str(launch.rdzv)] if launch.nnodes > 1 else [])


def _torchrun(launch: Launch) -> list[str]:
    processes = ["--nproc-per-node", str(launch.nproc)]
    if launch.nnodes == 1:
        return ["--standalone", *processes]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(launch.rdzv), "--rdzv-id", RUN_ID]
    return ["--nnodes", str(launch.nnodes), *processes, *meeting]
