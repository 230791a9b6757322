"""One of several processes that do a test's work together: ``rank.py PROGRAM FOLDER RANK SIZE``.

PROGRAM is a file beside the test with ``work(folder, name)``, which reads what the test has put
into the folder and writes what it found under that name: here ``rank-0``, ``rank-1``, … The fixture
``on_two_ranks`` starts it, and does the same work alone.
"""

import sys
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def loaded(program: Path) -> Any:
    """Import a program from its file."""
    spec = util.spec_from_file_location(f"{program.parent.name}_on_ranks", program)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Take part as one rank."""
    program, folder, rank, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)  # matrix products round by the number of threads
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    loaded(program).work(Path(folder), f"rank-{rank}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
