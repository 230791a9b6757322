"""Commands that several processes of one launch (torchrun) run together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def joined_ranks() -> Iterator[bool]:
    """Join the processes of a launch for the block; True for the one that speaks and writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


def require_one_process(command: str) -> None:
    """Refuse a launch of several processes for a command that would do all the work in each.

    Raises:
        UserError: names the command.
    """
    from unlearn.errors import UserError

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise UserError(f"`{command}` runs in one process, {size} were launched", "start it alone")
