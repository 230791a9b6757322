"""Time and peak memory of this process, on the GPU where there is one and else on the CPU."""

import time

import torch
from turns import forget_peak, resident


def now() -> float:
    """Give seconds on a clock, once a GPU has done all that it was told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def begin_peak() -> int:
    """Let the peak begin anew; give the bytes held now: allocated on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    forget_peak()
    return resident()


def peak() -> int:
    """Give the most bytes held since the peak began, in the same terms."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
