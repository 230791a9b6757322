r"""Time the training of dictionaries, and writing with clamped latents, against plain ways.

    python scripts/bench_sae.py train [--width 256 --layers 8 --layer 2 --features 4096 --k 32]
    python scripts/bench_sae.py train --model ../shared/models/stories260k --layer 2 \
        --data '../shared/data/tofu#full:train[:1000]' --features 1024 --k 16
    python scripts/bench_sae.py clamp [--width 512 --layers 8]

Without ``--model`` a random Llama of that width and depth is made in memory. Both ways take turns
in one process, in parts of as many steps or tokens; ratios are medians over these pairs, of the
time on the clock and of the processor's, which leaves out waiting for other programs.

``train``: tokens per second of :class:`unlearn.sae.train.Training` against ``plain_sae.py``: same
kind, k, latents, batch and rate. First the steps alone, on the same vectors: the squared errors of
both must agree, or no time is given. Then the whole training, model included; ours shuffles in a
buffer, so batches differ. What bounds it: of n layers ours runs l, and no head. Of a step's six
products of width x latents x batch (encode, decode, and four gradients) ours keeps one, the
encoder's, because the choice needs it; it and the choice among all latents are most of what is
left. With few latents per active one (64 at k 16) little is gained.

``clamp``: cached greedy generation of a batch with 20 latents of a random JumpReLU dictionary
clamped at one layer, against the same model without, and against encoding and decoding with the
whole dictionary there. What bounds it: 20 rows are nothing beside a layer; a hook's fixed cost per
forward pass is what is seen, so the smaller the model the larger its share.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from plain_sae import PlainLearner, PlainTraining
from random_llama import random_llama
from torch import Tensor

from unlearn.models import ModelSource, load_model
from unlearn.recipes.sae import Texts
from unlearn.sae.clamp import Clamp
from unlearn.sae.clamped import clamped
from unlearn.sae.corpus import Corpus, packed
from unlearn.sae.dictionary import Dictionary
from unlearn.sae.learner import Learner
from unlearn.sae.settings import TrainSettings
from unlearn.sae.splice import spliced
from unlearn.sae.stream import Activations, scale_of
from unlearn.sae.train import Training

AGREEMENT = 1e-3
"""Largest relative difference of the squared errors of both, over all steps."""
VOCABULARY = 2048
TITLES = ("", "clock", "processor", "half of all pairs", "plain", "ours")


def main() -> None:
    """Run what was asked for and print a table."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(("{:<22}" + "{:>11}" * 2 + "{:>19}" + "{:>12}" * 2).format(*TITLES))
    {"train": _train, "clamp": _clamp}[options.what](options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "clamp"))
    parser.add_argument("--model", help="instead of a random Llama, for train")
    parser.add_argument("--data", help="texts, with --model")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--layer", type=int, default=2, help="whose output is read or changed")
    parser.add_argument("--kinds", nargs="+", choices=("topk", "batchtopk"), default=["topk"])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1016, help="activations per step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed together")
    parser.add_argument("--rows", type=int, default=8, help="texts that are written together")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are written")
    parser.add_argument("--chosen", type=int, default=20, help="clamped latents")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    return parser.parse_args()


# Pairs of times

Times = tuple[float, float]
"""Seconds on the clock and of the processor."""


def _timed(work: Callable[[], Any]) -> Times:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def _report(name: str, units: int, pairs: Sequence[tuple[Times, Times]]) -> None:
    """Print how many times as fast the second of each pair is, and both in units per second."""
    clock, processor = ([a[i] / b[i] for a, b in pairs] for i in (0, 1))
    low, _, high = statistics.quantiles(clock, n=4)
    rates = [units / statistics.median(pair[i][0] for pair in pairs) for i in (0, 1)]
    ratios = f"{statistics.median(clock):>11.3f}{statistics.median(processor):>11.3f}"
    spread = f"{low:.3f} to {high:.3f}"
    print(f"{name:<22}{ratios}{spread:>19}{rates[0]:>10.0f}/s{rates[1]:>10.0f}/s", flush=True)


# Training


def _train(options: argparse.Namespace) -> None:
    model, corpus = _model_and_text(options)
    for kind in options.kinds:
        settings = TrainSettings(
            layer=options.layer, kind=kind, features=options.features, k=options.k, lr=1e-3,
            steps=100_000, batch=options.batch, warmup_steps=0, held_out=1,
            buffer=2 * (options.steps - 1) * options.batch,
            model_tokens=-(-options.batch // (options.context - 1)) * options.context,
        )  # fmt: skip
        source = Activations(model, corpus, options.layer)
        _steps(kind, settings, source, options)
        _whole(kind, settings, source, options)


def _model_and_text(options: argparse.Namespace) -> tuple[Any, Corpus]:
    if options.model:
        texts = Texts(ModelSource(options.model), options.data, template="{question} ")
        return load_model(options.model), texts.corpus(context=options.context, pack=True)[0]
    ids = np.random.default_rng(0).integers(3, VOCABULARY, 400 * options.context)
    corpus = packed([ids], front=[1], end=None, context=options.context)
    return random_llama(options.width, options.layers, VOCABULARY), corpus


def _steps(
    kind: str, settings: TrainSettings, source: Activations, options: argparse.Namespace
) -> None:
    """Give both the same batches, step by step."""
    rows = range(-(-4 * settings.batch // (options.context - 1)))
    batches = [one for one in source.of_rows(rows).split(settings.batch) if len(one) > 1][:4]
    batches = [one * scale_of(batches[0]) for one in batches]
    ours = Learner(settings, source.width)
    ours.begin(batches[0])
    plain, pairs = PlainLearner(ours), []
    for place in range(2 + 2 * options.repeats):
        x, told = batches[place % len(batches)], []
        first = _timed(lambda x=x, told=told: told.append(plain.learn(x)))
        second = _timed(lambda x=x, told=told: told.append(ours.learn(x, len(x)).error))
        if abs(told[0] - told[1]) > AGREEMENT * told[0]:
            sys.exit(f"step {place}: errors {told[0]} and {told[1]}: there is nothing to compare")
        pairs += [(first, second)] if place >= 2 else []
    _report(f"{kind}, steps alone", settings.batch, pairs)


def _whole(
    kind: str, settings: TrainSettings, source: Activations, options: argparse.Namespace
) -> None:
    """Train both ways; ours fills half of its buffer once in every part that is timed."""
    ours = Training(source, settings)
    plain = PlainTraining(source.model, source.corpus, settings, source.width)

    def several(step: Callable[[], None]) -> None:
        for _ in range(options.steps):
            step()

    several(plain.step)
    several(ours.step)
    turns = [plain.step, ours.step]
    pairs = [
        tuple(_timed(partial(several, step)) for step in turns) for _ in range(options.repeats)
    ]
    _report(f"{kind}, with the model", options.steps * settings.batch, pairs)  # type: ignore[arg-type]


# Clamping

Change = Callable[[], AbstractContextManager[Any]]


def _clamp(options: argparse.Namespace) -> None:
    model = random_llama(options.width, options.layers, VOCABULARY)
    ids = torch.randint(3, VOCABULARY, (options.rows, 32))
    dictionary = _random_dictionary(model, ids, options)
    chosen = torch.randperm(options.features)[: options.chosen].tolist()
    changes = {
        f"{options.chosen} latents clamped": _few(model, dictionary, chosen, options.layer),
        "whole dictionary": lambda: spliced(
            model, options.layer, partial(_overwritten, dictionary, chosen)
        ),
    }
    for name, change in changes.items():
        turns: list[Change] = [nullcontext, change]
        work = [partial(_written, model, ids, one, options.tokens) for one in turns]
        work[1]()
        pairs = [tuple(_timed(one) for one in work) for _ in range(options.repeats)]
        _report(name, options.rows * options.tokens, pairs)  # type: ignore[arg-type]


def _random_dictionary(model: Any, ids: Tensor, options: argparse.Namespace) -> Dictionary:
    """Draw one whose latents are active on about one token in fifty."""
    directions = torch.nn.functional.normalize(torch.randn(options.features, options.width), dim=1)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[options.layer + 1]
    pre = states.flatten(0, 1) @ directions.t()
    return Dictionary(
        "jumprelu", directions.t().contiguous(), torch.zeros(options.features), directions,
        torch.zeros(options.width), threshold=pre.quantile(0.98, dim=0).clamp_min(0),
    )  # fmt: skip


def _few(model: Any, dictionary: Dictionary, chosen: list[int], layer: int) -> Change:
    """Clamp the chosen latents by their own rows alone."""
    return lambda: clamped(model, [Clamp.of(dictionary, chosen, layer=layer, c=20.0)], [1])


def _overwritten(dictionary: Dictionary, chosen: list[int], hidden: Tensor) -> Tensor:
    """Encode, overwrite, decode and add the rest back, as it is published."""
    a = dictionary.encode(hidden)
    changed = a.clone()
    changed[..., chosen] = torch.where(a[..., chosen] > 0, -20.0, a[..., chosen])
    return dictionary.decode(changed) + (hidden - dictionary.decode(a))


@torch.no_grad()
def _written(model: Any, ids: Tensor, change: Change, tokens: int) -> None:
    with change():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip


if __name__ == "__main__":
    main()
