r"""Time our NPO step, and the memory it takes, against a plain implementation of the same step.

    python scripts/bench_step.py --model ../shared/models/tofu-tiny-target \
        --forget '../shared/data/tofu#forget10' --retain '../shared/data/tofu#full:train[:400]'

It is ``bench_objectives.py --methods npo --memory``, which says what is compared and how.
"""

import sys

import bench_objectives

if __name__ == "__main__":
    bench_objectives.main([*sys.argv[1:], "--methods", "npo", "--memory"])
