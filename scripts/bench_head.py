r"""Time a forward and backward pass, and the memory it takes, with the head in chunks and in full.

    python scripts/bench_head.py --width 256 --layers 4 --vocabulary 32000
    python scripts/bench_head.py --dtype bfloat16 --width 2048 --layers 16 --vocabulary 128256

In full: transformers' own logits ``[batch, seq, vocab]``, upcast to fp32 as every loss must be, and
log-softmax over them. In chunks: :class:`unlearn.scores.Scorer` as the trainer uses it, which sends
labelled positions alone through the head, a chunk at a time. Both give the loss of the same rows
(``--labelled`` of each row's tokens count), go back, and take turns in one process. Losses must
agree. ``last block``: the last layer's feed-forward block too runs on labelled positions only; the
first ratio leaves that out.

What bounds it: logits of n positions are n * vocabulary numbers, held some five times in full (in
the model's precision, in fp32, their log-softmax and the gradients). Chunks hold 256 MiB once or
twice and compute a chunk's logits again in the backward pass, a quarter more of the head's work,
where a stream has more than one.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from on_device import begin_peak, now, peak
from random_llama import random_llama
from torch import Tensor

from unlearn.scores import Scorer

AGREEMENT = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest relative difference of the losses."""


def main() -> None:
    """Run both ways in turn and print one JSON object."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_llama(options.width, options.layers, options.vocabulary)
    model = model.to(device, getattr(torch, options.dtype)).train()
    whole = Scorer.for_model(model)
    ways = {"full": Scorer(None), "chunks": replace(whole, last_block=None), "last block": whole}
    rows = _rows(options, device)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(options.turns + 1):
        for way, scorer in ways.items():
            measured = _pass(model, scorer, rows)
            if turn:  # the first warms up
                found[way].append(measured)
    _check(found, options.dtype)
    print(json.dumps({"device": _name(device), **_summary(found, options)}, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = {
        "width": 256, "layers": 4, "vocabulary": 32000, "batch": 8, "length": 256, "turns": 5,
        "threads": 1,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--labelled", type=float, default=0.5, help="share of tokens that count")
    parser.add_argument("--dtype", choices=tuple(AGREEMENT), default="float32")
    return parser


def _rows(options: argparse.Namespace, device: str) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(1)
    ids = torch.randint(3, options.vocabulary, (options.batch, options.length), generator=dice)
    labels = ids.clone()
    labels[:, : round((1 - options.labelled) * options.length)] = -100
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in rows.items()}


def _pass(model: Any, scorer: Scorer, rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Go there and back; give seconds, loss and the peak beyond what was held before."""
    model.zero_grad()
    held, begun = begin_peak(), now()
    scores = scorer(model, rows)
    loss = -scores.log_probs.sum() / scores.mask.sum()
    loss.backward()
    seconds = now() - begun
    return {"seconds": seconds, "loss": float(loss.detach()), "bytes": peak() - held}


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _check(found: Mapping[str, list[dict[str, float]]], dtype: str) -> None:
    losses = [measured["loss"] for way in found.values() for measured in way]
    if max(losses) - min(losses) > AGREEMENT[dtype] * max(losses):
        raise SystemExit(f"the losses differ: {min(losses)} and {max(losses)}")


def _summary(
    found: Mapping[str, list[dict[str, float]]], options: argparse.Namespace
) -> dict[str, Any]:
    told = {}
    for way, passes in found.items():
        pairs = zip(found["full"], passes, strict=True)
        told[way] = {
            "tokens_per_second": round(options.batch * options.length / _median(passes, "seconds")),
            "speedup": round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 2),
            "peak_mebibytes": round(_median(passes, "bytes") / 2**20),
        }
    return told


def _median(passes: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] for one in passes)


if __name__ == "__main__":
    main()
