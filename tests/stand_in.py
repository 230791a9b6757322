"""Program of test_launch.py: a rank that waits for the others, and ends as it is told to."""

import os
import signal
import sys
import time

import torch
from torch import distributed

from unlearn import launch


def main(what: str) -> int | None:
    launch.enter()
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    distributed.init_process_group("gloo")
    for turn in range(1200):
        time.sleep(0.05)
        flag = torch.tensor([len(asked)])
        distributed.all_reduce(flag)
        if flag:
            time.sleep(1.5 * launch.rank())  # one is done before the other
            return launch.leave(75, "stopped")
        if turn == 2 and what == "finish":
            return launch.leave(0)
        if turn == 2 and launch.rank() == 1 and what == "fail":
            return launch.leave(1, "the disk is full", "free some space")
        if turn == 2 and launch.rank() == 1 and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if turn == 2 and launch.rank() == 1 and what == "frozen":
            launch.leave(1, "told before it froze")
            os.kill(os.getpid(), signal.SIGSTOP)
    return 9


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(9 if code is None else code)
