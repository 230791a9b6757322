r"""Time our training steps against plain implementations of the same steps.

    python scripts/bench_objectives.py --model ../shared/models/tofu-tiny-target \
        --forget '../shared/data/tofu#forget10' --retain '../shared/data/tofu#full:train[:400]' \
        [--methods npo satimp grad_diff rmu] [--layers 8 --width 512]

``plain_steps.py`` has the plain losses: a forward pass per stream, padding, full logits, a deep
copy of the model as reference, and for RMU all layers with gradients for all weights. Ours is the
step of :class:`unlearn.training.UnlearningTrainer`. Both use the same rows, AdamW over the same
weights, clipping and threads. Both start a little away from the reference, so that no term is 0,
and losses and gradient norms of all steps must agree, or no time is given.

Each variant runs in a process of its own; they take their steps in turn, one waiting for the other,
and ratios are medians over these pairs of steps, so that a busy machine hits both alike. Beside the
time on the clock stands that of the processor (summed over threads), which leaves out waiting for
other programs. ``--layers``: a random Llama of that
depth, made in memory, takes the place of the model; its tokenizer stays. ``--memory``: the peak
resident size during the steps minus that of the loaded model too, in runs of their own whose
allocator gives freed blocks back at once. Gradients and AdamW's state (3 x the trained weights) are
in it for both; ``activation_memory_ratio`` leaves them out.

What bounds each, in units of one forward pass over 8 rows (a backward pass is two): matrix products
over real tokens are about 70% of our step on a CPU, and nothing makes those fewer.

- ``npo``: plain does 7 on padded rows (2 streams x 3, the reference 1), ours 6 on real tokens.
- ``grad_diff``, ``satimp``: 6 on padded rows against 6 on real tokens; the reference costs memory
  alone. What is gained is padding, the logits of positions that are not labelled, and the last
  layer's feed-forward block there: the spread of row lengths and the share of prompts are the
  bound.
- ``rmu``: plain runs all n layers three times and goes back through the l lower ones, with
  gradients for all their weights. Ours ends at layer l (the first is 1) and has gradients for the
  trained matrices alone: 3n + 4l against about 5l layers, so the depth is the bound. Where the
  trained matrices stand far above the first layer (Zephyr: layers 5 to 7 of 32) we also go back
  through these three only: ``--layers 32 --width 256 --layer 7``.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import plain_steps
import torch
from random_llama import random_llama
from torch import Tensor
from transformers import TrainingArguments
from turns import EXACT, answer, in_turn, resident, worker

from unlearn.data import Template, encode, load_rows, pad_token_id
from unlearn.data.collate import Collator, Item
from unlearn.models import load_model, load_tokenizer, train_only
from unlearn.objectives import OBJECTIVES
from unlearn.packing import can_pack, packable
from unlearn.reference import LiveReference, score_rows
from unlearn.scores import Scorer
from unlearn.terms import Term
from unlearn.training import UnlearningTrainer

WARMUP = 2
VARIANTS = ("plain", "ours")
NUDGE = 1e-3
"""Noise on the weights before the first step, in units of each tensor's spread."""
AGREEMENT = 1e-3
"""Largest relative difference of losses and gradient norms, in fp32, over all steps."""
LEAST = 1e-2
"""What is nearer 0 is a difference of larger numbers: it is compared as if it were this large."""
Step = Callable[[Any], tuple[float, float]]
"""Does one optimiser step; gives loss and gradient norm."""


@dataclass(frozen=True)
class Method:
    """A training method: our terms, and the plain loss that is to be the same number."""

    terms: tuple[Term, ...]
    plain: plain_steps.PlainLoss
    trained: tuple[str, ...] = ()
    """Regular expressions over names of weights; none means all."""


def methods(layer: int) -> dict[str, Method]:
    """List what is timed, with the published settings; ``layer`` is the one that RMU reads."""
    last = "|".join(str(each) for each in range(max(0, layer - 2), layer + 1))
    nll = Term(OBJECTIVES["nll"], "retain")
    beta, steering, held = {"beta": 0.1}, {"steering": 20.0}, 100.0
    exponents, light = {"beta1": 5.0, "beta2": 0.1}, 0.1
    return {
        "npo": Method(
            (Term(OBJECTIVES["npo"], "forget", 1.0, beta), nll), partial(plain_steps.npo, **beta)
        ),
        "satimp": Method(
            (
                Term(OBJECTIVES["satimp"], "forget", 1.0, exponents),
                Term(OBJECTIVES["nll"], "retain", light),
            ),
            partial(plain_steps.satimp, **exponents, retain=light),
        ),
        "grad_diff": Method(
            (Term(OBJECTIVES["grad_ascent"], "forget"), nll), plain_steps.grad_diff
        ),
        "rmu": Method(
            (
                Term(OBJECTIVES["rmu"], "forget", 1.0, {**steering, "layer": layer}),
                Term(OBJECTIVES["embed_diff"], "retain", held, {"layer": layer}),
            ),
            partial(plain_steps.rmu, **steering, layer=layer, retain=held),
            (rf"layers\.({last})\.mlp\.down_proj\.weight$",),
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all variants of all methods in turn and print one JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    if options.worker:
        answer(_work(options))
        return
    found = {}
    for method in options.methods:
        races = [_race(method, arguments) for _ in range(options.repeats)]
        found[method] = _summary([pair for race in races for pair in race])
        if options.memory:
            found[method] |= _memory(method, options, arguments)
        print(f"{method}: {found[method]['speedup']} times as fast", file=sys.stderr)
    print(json.dumps(found, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--forget", required=True)
    parser.add_argument("--retain", required=True)
    names = list(methods(0))
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--layers", type=int, help="take a random Llama of this depth")
    parser.add_argument("--width", type=int, default=512, help="width of the random Llama")
    parser.add_argument("--layer", type=int, help="that RMU reads; a quarter of the way up")
    parser.add_argument("--batch", type=int, default=8, help="rows per stream")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of processes")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--memory", action="store_true", help="measure memory too")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser


# Processes in turn

Pair = dict[str, dict[str, float]]
"""What both variants said of the same step: time, loss and gradient norm."""


def _race(method: str, arguments: Sequence[str]) -> list[Pair]:
    """Let both variants take the same steps, one at a time and in turn; warming up is left out."""
    steps = _parser().parse_args(arguments).steps + WARMUP
    with ExitStack() as stack:
        workers = {
            variant: stack.enter_context(worker(__file__, arguments, method, variant))
            for variant in VARIANTS
        }
        return in_turn(workers, steps)[WARMUP:]


def _memory(method: str, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Compare the memory that both variants take, each alone."""
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        with worker(__file__, arguments, method, variant, **EXACT) as process:
            told = in_turn({variant: process}, options.steps + WARMUP)
        found[variant] = told[-1][variant]
    plain, ours = (found[variant] for variant in VARIANTS)
    return {
        "extra_memory_ratio": round(ours["extra"] / plain["extra"], 3),
        "activation_memory_ratio": round(ours["beyond"] / plain["beyond"], 3),
        "extra_mebibytes": {name: round(one["extra"] / 2**20, 1) for name, one in found.items()},
    }


def _summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    difference = max(_difference(pair["plain"], pair["ours"]) for pair in pairs)
    if difference > AGREEMENT:
        sys.exit(f"the two steps differ by {difference:.2g}: there is nothing to compare")

    def ratios(name: str) -> list[float]:
        return [pair["plain"][name] / pair["ours"][name] for pair in pairs]

    quarters = statistics.quantiles(ratios("seconds"), n=4)
    return {
        "speedup": round(statistics.median(ratios("seconds")), 3),
        "half_of_all_pairs": [round(quarters[0], 3), round(quarters[2], 3)],
        "speedup_of_processor_time": round(statistics.median(ratios("processor")), 3),
        "seconds_per_step": {
            each: round(statistics.median(pair[each]["seconds"] for pair in pairs), 4)
            for each in VARIANTS
        },
        "largest_relative_difference": difference,
        "pairs": len(pairs),
    }


def _difference(one: dict[str, float], two: dict[str, float]) -> float:
    """Give the larger relative difference of the losses and gradient norms of a step."""
    pairs = [(one[name], two[name]) for name in ("loss", "norm")]
    return max(abs(a - b) / max(abs(a), abs(b), LEAST) for a, b in pairs)


# One process


def _work(options: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Do the steps of one variant of one method; say that all is loaded, then how each went."""
    if options.threads:
        torch.set_num_threads(options.threads)
    name, variant = options.worker
    model = _model(options)
    method = methods(_layer(options, model))[name]
    batches = _batches(options, model, method)
    loaded = resident()
    step = {"plain": _plain, "ours": _ours}[variant](model, method)
    _nudge(_trained(model, method))
    state = 3 * sum(p.numel() * p.element_size() for p in _trained(model, method))
    yield {}
    for batch in batches:
        start, before = time.perf_counter(), time.process_time()
        loss, norm = step(batch)
        seconds, processor = time.perf_counter() - start, time.process_time() - before
        extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - loaded
        beyond = extra - state
        yield {"seconds": seconds, "processor": processor, "loss": loss, "norm": norm,
               "extra": extra, "beyond": beyond}  # fmt: skip


def _model(options: argparse.Namespace) -> Any:
    """Load the model, or make a random one for its tokenizer."""
    if options.layers is None:
        return load_model(options.model)
    return random_llama(options.width, options.layers, len(load_tokenizer(options.model)))


def _layer(options: argparse.Namespace, model: Any) -> int:
    return model.config.num_hidden_layers // 4 if options.layer is None else options.layer


def _trained(model: Any, method: Method) -> list[Tensor]:
    """Freeze what the method does not train; give the rest."""
    if method.trained:
        train_only(model, method.trained)
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def _nudge(weights: Sequence[Tensor]) -> None:
    """Move the weights a little, always alike: at the reference itself some terms would be 0."""
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        noise = torch.randn(weight.shape, generator=generator)
        weight += NUDGE * weight.std() * noise


def _batches(options: argparse.Namespace, model: Any, method: Method) -> list[dict[str, Any]]:
    """Give both variants the same random batches, with the stored reference where one is asked."""
    tokenizer = load_tokenizer(options.model)
    template = Template.for_tokenizer(tokenizer)
    size = (options.steps + WARMUP) * options.batch
    generator = torch.Generator().manual_seed(0)
    streams = {}
    for name in ("forget", "retain"):
        spec = getattr(options, name)
        rows = encode(load_rows(spec), tokenizer, template, max_length=512, source=spec)
        order = torch.randperm(len(rows), generator=generator).tolist()
        streams[name] = [rows[order[place % len(rows)]] for place in range(size)]
    scorer = Scorer.for_model(model)
    stored = {
        term.on: score_rows(scorer, model, streams[term.on], batch_tokens=1024)
        for term in method.terms
        if term.objective.uses_reference and term.layer is None
    }
    collate = Collator(pad_token_id(tokenizer), stored)
    items = [
        {name: Item(rows[place], place) for name, rows in streams.items()} for place in range(size)
    ]
    return [
        collate(items[start : start + options.batch]) for start in range(0, size, options.batch)
    ]


def _finish(model: Any, optimizer: torch.optim.Optimizer) -> float:
    (group,) = optimizer.param_groups
    norm = torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    model.zero_grad()
    return float(norm)


def _plain(model: Any, method: Method) -> Step:
    """Do the step as research code does it: all weights get gradients, also where few train."""
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(_trained(model, method), lr=1e-5)
    model.requires_grad_(True).train()

    def step(batches: Any) -> tuple[float, float]:
        loss = method.plain(model, reference, batches)
        loss.backward()
        return loss.item(), _finish(model, optimizer)

    return step


class _NoRows(list[int]):
    """Stands for the rows of a trainer that is handed its batches."""

    streams: ClassVar[dict[str, Any]] = {}


def _ours(model: Any, method: Method) -> Step:
    """Do the step as the trainer does it."""
    optimizer = torch.optim.AdamW(_trained(model, method), lr=1e-5)
    live = any(term.objective.uses_reference and term.layer is not None for term in method.terms)
    trainer = UnlearningTrainer(
        model=model,
        args=TrainingArguments(tempfile.mkdtemp(), report_to=[], disable_tqdm=True, use_cpu=True),
        train_dataset=_NoRows([0]),
        data_collator=lambda items: items,
        terms=method.terms,
        scorer=Scorer.for_model(model),
        live=LiveReference.of(model) if live else None,
    )
    trainer.state.global_step = 1  # the first step also checks every gradient
    open_until_exit = ExitStack()
    if can_pack(model):
        open_until_exit.enter_context(packable(model))

    def step(batch: Any, _open: ExitStack = open_until_exit) -> tuple[float, float]:
        batches, counts = trainer.get_batch_samples(iter([batch]), 1, "cpu")
        loss = trainer.training_step(model, batches[0], counts)
        return float(loss), _finish(model, optimizer)

    return step


if __name__ == "__main__":
    main()
