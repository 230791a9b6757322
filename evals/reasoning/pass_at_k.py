"""What many verdicts on many problems say together: pass@k and how sure it is.

Pure functions. Two kinds of chance are told apart: ``sampling_error`` is how much pass@1 would move
with other samples of the same problems, intervals say how much a figure would move with other
problems of the same kind (each with its own samples).
"""

import math
from collections.abc import Sequence

import numpy as np

from unlearn.evals.benchmark import Metric
from unlearn.evals.statistics import mean_with_interval


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Give the chance that k of n samples, drawn without replacement, hold a right one, in [0, 1].

    1 − C(n−c, k) / C(n, k), the unbiased estimate of Chen et al. 2021 (arXiv:2107.03374, eq. 1), as
    a product, in which nothing overflows. With k = n: whether any is right.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} with {correct} of {n} right")
    return 1.0 - math.prod(max(0, n - correct - i) / (n - i) for i in range(k))


def sampling_error(verdicts: Sequence[Sequence[bool]]) -> float | None:
    """Give the standard error of pass@1 over samples; None with one sample.

    ``verdicts`` is [problem, sample]. Each sample number gives one score of the whole benchmark;
    their standard deviation (n − 1) / sqrt(n), as REDI reports it (Xu et al. 2025,
    arXiv:2505.24850). It holds no doubt about the choice of problems.
    """
    scores = np.asarray(verdicts, float).mean(0)
    return float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None


def pass_metrics(
    verdicts: Sequence[Sequence[bool]], ks: Sequence[int], *, seed: int = 0
) -> dict[str, Metric]:
    """Give ``math_pass_at_K`` for each k: means over problems with bootstrap intervals.

    Problems are resampled with all their samples, so that the interval holds both kinds of chance.
    """
    found = {}
    for k in ks:
        values = [pass_at_k(len(row), sum(row), k) for row in verdicts]
        metric = Metric.mean(values, "higher")
        found[f"math_pass_at_{k}"] = mean_with_interval(metric, values, seed=seed)
    return found


def curve(verdicts: Sequence[Sequence[bool]]) -> list[tuple[int, float]]:
    """Give (k, pass@k) for every k up to the number of samples."""
    n = len(verdicts[0])
    return [
        (k, math.fsum(pass_at_k(n, sum(row), k) for row in verdicts) / len(verdicts))
        for k in range(1, n + 1)
    ]
