r"""Time our NPO step against a plain implementation of the same step.

    python scripts/bench_step.py --model ../shared/models/tofu-tiny-target \\
        --forget '../shared/data/tofu#forget10' --retain '../shared/data/tofu#full:train[:400]'

The plain step is what research code does: one forward for the forget rows, one for the retain rows,
one through a deep-copied frozen reference, full logits each time. Ours: both streams in one packed
forward, the reference read from the cache, only labelled positions through the vocabulary head.
Both use the same rows, AdamW, clipping and threads, and both losses are compared before timing.

Each variant runs in its own process, in turn, several times; the ratios are medians over pairs, so
that a noisy machine hits both alike. Extra memory is the peak resident size during the steps minus
the size once the model is loaded, in a run of its own whose allocator gives freed blocks back at
once; gradients and AdamW's state (3 x weights) are in it for both, and are left out of
``activation_memory_ratio``.

What bounds it: matrix products over real tokens (about 70% of our step on a CPU), which is why
leaving padding out pays; then attention, which runs on rows padded to the longest. Plain does 7
units of body work on padded rows (2 x forward and backward of 8 rows = 6, the reference 1), ours 6
on real tokens, so the gain grows with the spread of row lengths.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from unlearn.data import Template, encode, load_rows, pad_token_id
from unlearn.data.collate import Collator, Item
from unlearn.models import load_model, load_tokenizer
from unlearn.objectives import OBJECTIVES
from unlearn.packing import can_pack, packable
from unlearn.reference import score_rows
from unlearn.scores import Scorer
from unlearn.training import Term, UnlearningTrainer

WARMUP = 2
TERMS = (Term(OBJECTIVES["npo"], "forget", 1.0, {"beta": 0.1}), Term(OBJECTIVES["nll"], "retain"))
Step = Callable[[dict[str, Any]], float]


def main() -> None:
    """Run both variants in turn and print one JSON object."""
    options = _options()
    if options.worker:
        print(json.dumps(_work(options)))
        return
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    for repeat in range(options.repeats):
        for variant in ("plain", "ours"):
            timed = _spawn(variant)
            exact = _spawn(variant, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
            runs[variant].append(timed | {"extra": exact["extra"], "beyond": exact["beyond"]})
            print(f"{repeat + 1}/{options.repeats} {variant}: {runs[variant][-1]}", file=sys.stderr)
    print(json.dumps(_summary(runs), indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--forget", required=True)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--batch", type=int, default=8, help="rows per stream")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--worker", choices=("plain", "ours"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _spawn(variant: str, **environment: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--worker", variant]
    env = os.environ | environment
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    pairs = list(zip(runs["plain"], runs["ours"], strict=True))
    losses = [abs(a["loss"] - b["loss"]) for a, b in pairs]
    assert max(losses) < 1e-3, f"the two steps differ: {losses}"
    return {
        "speedup": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
        "extra_memory_ratio": statistics.median(b["extra"] / a["extra"] for a, b in pairs),
        "steps_per_second": {
            name: statistics.median(1 / run["seconds"] for run in found)
            for name, found in runs.items()
        },
        "activation_memory_ratio": statistics.median(b["beyond"] / a["beyond"] for a, b in pairs),
        "extra_mebibytes": {
            name: round(statistics.median(run["extra"] for run in found) / 2**20, 1)
            for name, found in runs.items()
        },
        "largest_loss_difference": max(losses),
        "pairs": len(pairs),
    }


def _work(options: argparse.Namespace) -> dict[str, float]:
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options.model)
    batches = _batches(options, model)
    loaded = _resident()
    prepare = {"plain": _plain, "ours": _ours}[options.worker]
    step = prepare(model)
    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    timed = statistics.median(seconds[WARMUP:])
    state = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    extra = float(peak - loaded)
    return {"seconds": timed, "loss": losses[0], "extra": extra, "beyond": extra - state}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _batches(options: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    """Give the same random batches to both variants, with the reference's token log-probs."""
    tokenizer = load_tokenizer(options.model)
    template = Template.for_tokenizer(tokenizer)
    streams, stored = {}, {}
    for name in ("forget", "retain"):
        spec = getattr(options, name)
        rows = load_rows(spec)
        streams[name] = encode(rows, tokenizer, template, max_length=512, source=spec)
    stored["forget"] = score_rows(
        Scorer.for_model(model), model, streams["forget"], batch_tokens=1024
    )
    collate = Collator(pad_token_id(tokenizer), stored)
    generator = torch.Generator().manual_seed(0)
    picks = {
        name: torch.randperm(len(found), generator=generator).tolist()
        for name, found in streams.items()
    }
    batches = []
    for start in range(0, (options.steps + WARMUP) * options.batch, options.batch):
        places = range(start, start + options.batch)
        items = [
            {
                name: Item(found[picks[name][i % len(found)]], picks[name][i % len(found)])
                for name, found in streams.items()
            }
            for i in places
        ]
        batches.append(collate(items))
    return batches


def _finish(model: Any, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _plain(model: Any) -> Step:
    """Do the step with separate forwards, a live deep copy as reference and full logits."""
    reference = copy.deepcopy(model).eval()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    keys = ("input_ids", "attention_mask")

    def sequence(which: Any, batch: Any) -> torch.Tensor:
        logits = which(**{key: batch[key] for key in keys}).logits.float()
        labels = batch["labels"][:, 1:]
        log_probs = logits[:, :-1].log_softmax(-1)
        chosen = log_probs.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
        return (chosen * (labels != -100)).sum(-1)

    def step(batch: dict[str, Any]) -> float:
        policy = sequence(model, batch["forget"])
        with torch.no_grad():
            frozen = sequence(reference, batch["forget"])
        npo = -2 / 0.1 * torch.nn.functional.logsigmoid(-0.1 * (policy - frozen)).mean()
        retain = {key: batch["retain"][key] for key in (*keys, "labels")}
        loss = npo + model(**retain).loss
        loss.backward()
        _finish(model, optimizer)
        return loss.item()

    return step


def _ours(model: Any) -> Step:
    """Do the step as the trainer does it."""
    folder = tempfile.mkdtemp()
    trainer = UnlearningTrainer(
        model=model,
        args=TrainingArguments(folder, report_to=[], disable_tqdm=True, use_cpu=True),
        train_dataset=[0],
        data_collator=lambda items: items,
        terms=TERMS,
        scorer=Scorer.for_model(model),
    )
    trainer.state.global_step = 1  # the first step also checks every gradient
    open_until_exit = ExitStack()
    if can_pack(model):
        open_until_exit.enter_context(packable(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(batch: dict[str, Any], _open: ExitStack = open_until_exit) -> float:
        batches, counts = trainer.get_batch_samples(iter([batch]), 1, "cpu")
        loss = trainer.training_step(model, batches[0], counts)
        _finish(model, optimizer)
        return float(loss)

    return step


if __name__ == "__main__":
    main()
