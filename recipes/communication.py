"""What a device sends per optimiser step, by engine, and how long that takes at least.

A collective over N devices is counted as its ring algorithm sends it: an all-gather or a
reduce-scatter of M bytes costs every device M (N-1)/N bytes, an all-reduce twice that (Rajbhandari
et al. 2020, arXiv:1910.02054, section 7). How often each is done was read in the sources of
transformers 5.23, accelerate 1.15, torch 2.13 and DeepSpeed 0.19:

* DDP and FSDP2 accumulate without talking: Trainer enters ``no_sync`` for all micro-batches but the
  last. DeepSpeed reduces gradients in every micro-batch.
* FSDP2 and ZeRO 3 gather the weights in the forward and again in the backward pass of every
  micro-batch. That is a ceiling: both keep some of them (FSDP2 the head, ZeRO 3 what is used again
  soon, up to ``stage3_max_live_parameters``).
* ZeRO 2 all-reduces its gradients (``use_multi_rank_bucket_allreduce``), though each process needs
  only its part; after the update the new weights are gathered.
"""

from dataclasses import dataclass
from typing import Any

from unlearn.engines import Engine


@dataclass(frozen=True)
class Traffic:
    """One collective of a step: what it moves, how often, and the bytes a device sends in all."""

    what: str
    times: int
    bytes: float


def traffic(
    engine: Engine,
    processes: int,
    *,
    weights: float,
    gradients: float,
    accumulation: int = 1,
    passes: int = 2,
    sync_each: bool = False,
) -> list[Traffic]:
    """List what every device sends in one optimiser step.

    ``weights`` and ``gradients`` are the bytes of all weights and of the gradients of what is
    trained, ``passes`` how often a micro-batch needs the weights (forward and backward: 2; a third
    when the frozen start is asked with adapters off). ``sync_each``: FSDP2 reduces gradients in
    every micro-batch, so that no device keeps them whole.
    """
    share = (processes - 1) / processes
    if engine == "none" or processes == 1:
        return []
    if engine == "ddp":
        return [Traffic("all-reduce of gradients", 1, 2 * gradients * share)]
    if engine == "zero2":
        return [
            Traffic("all-reduce of gradients", accumulation, 2 * gradients * share * accumulation),
            Traffic("all-gather of new weights", 1, gradients * share),
        ]
    gathers = passes * accumulation
    reductions = accumulation if engine != "fsdp2" or sync_each else 1
    return [
        Traffic("all-gather of weights", gathers, weights * share * gathers),
        Traffic("reduce-scatter of gradients", reductions, gradients * share * reductions),
    ]


def sent(parts: list[Traffic]) -> float:
    """Give the bytes that a device sends per step."""
    return sum(part.bytes for part in parts)


@dataclass(frozen=True)
class Machine:
    """Nominal figures of a cluster: bytes and floating-point operations per second.

    The defaults are nodes of eight H100 SXM: NVLink with 450 GB/s in each direction, one network
    adapter of 400 Gb/s per device, 989 TFLOP/s in bfloat16 of which 40 % are used.
    """

    devices_per_node: int = 8
    inside: float = 450e9
    between: float = 50e9
    flops: float = 989e12
    used: float = 0.4

    def seconds(self, sent_bytes: float, devices: int) -> float:
        """Give the least time for what each of these devices sends.

        Between nodes a ring passes each node once, and all its adapters share the work: together
        they carry what one device sends.
        """
        inside = sent_bytes / self.inside
        if devices <= self.devices_per_node:
            return inside
        return max(inside, sent_bytes / (self.between * self.devices_per_node))

    def compute_seconds(self, parameters: float, tokens: float) -> float:
        """Give the time of one device for these tokens: 6 operations per parameter and token.

        Two for the forward and four for the backward pass (Kaplan et al. 2020, arXiv:2001.08361).
        """
        return 6 * parameters * tokens / (self.flops * self.used)


def described(parts: list[Traffic]) -> dict[str, Any]:
    """Give the traffic as plain values, for a plan."""
    return {
        "bytes_per_step": round(sent(parts)),
        "parts": [
            {"what": part.what, "times": part.times, "bytes": round(part.bytes)} for part in parts
        ],
    }
