"""Time the detection engine against the plain way: one text at a time, a pass per score family.

    python scripts/bench_detect.py --model ../shared/models/tofu-tiny-target [--texts 1000]
    python scripts/bench_detect.py --megabytes 200 --blocks 20   # memory, first blocks of a file

Both compute the same scores of the same texts with the same model, in turn and in one process;
ratios are medians over repeats, and the largest difference between the scores is printed. On a busy
machine compare the work (seconds of the processor), not the time that passed.

``plain`` is the order of the published scripts: every text alone, a forward pass with full logits
for each family of scores (loss with zlib, Min-K%, Min-K%++, Gap-K%, DC-PDD), tensor operations on
the whole of them. ``shared`` is kinder: one forward pass per text serves all families. ``ours`` is
:class:`unlearn.detect.engine.TextScorer`: batches of similar lengths without padding, only scored
positions reach the vocabulary head, and its statistics take two sweeps over each row of logits.
Loops over tokens in Python, which some published scripts have, are left out of ``plain``.

With ``--megabytes`` a file of that size is written to a temporary folder and its first blocks are
scored; the peak of the process's memory is printed for it and for a file a hundredth as long, each
in a process of its own, together with that of a process that loads the model and scores nothing.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from unlearn.data.people import demo_folder
from unlearn.detect import TokenFrequencies
from unlearn.detect.engine import TextScorer
from unlearn.detect.inputs import Inputs
from unlearn.detect.settings import Settings
from unlearn.detect.text import Text
from unlearn.models import load_model, load_tokenizer

SCORES = ("loss", "zlib", "mink", "minkpp", "gapk", "dcpdd")
FAMILIES = (("loss", "zlib"), ("mink",), ("minkpp",), ("gapk",), ("dcpdd",))
LENGTHS = (16, 32, 64, 128, 256, 400)
"""Lengths of texts in tokens, each as frequent; tokenised again, texts get a little longer."""
Scores = list[dict[str, float]]


def main() -> None:
    """Run what was asked for and print one JSON object."""
    options = _options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.megabytes:
        print(json.dumps(_memory(options), indent=2))
        return
    print(json.dumps(_speed(options), indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(demo_folder() / "target"))
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's default")
    parser.add_argument("--vocabulary", type=int, default=0, help="widen the head, at random")
    parser.add_argument(
        "--megabytes", type=int, default=0, help="measure memory on a file so large"
    )
    parser.add_argument("--blocks", type=int, default=20, help="blocks of it that are scored")
    return parser.parse_args()


def _speed(options: argparse.Namespace) -> dict[str, Any]:
    from unlearn.models import ModelSource

    source = ModelSource(options.model, dtype=options.dtype)
    model, tokenizer = load_model(source), load_tokenizer(source)
    if options.vocabulary:
        model.resize_token_embeddings(options.vocabulary, mean_resizing=False)
    texts = _texts(tokenizer, options.texts)
    table = _table(model.get_output_embeddings().weight.shape[0])
    settings = Settings(scores=SCORES, batch_tokens=options.batch_tokens)
    scorer = TextScorer.of(model, tokenizer, settings, frequencies=table)
    variants: dict[str, Callable[[Sequence[str]], Scores]] = {
        "plain": lambda some: _plain(model, tokenizer, some, table, FAMILIES),
        "shared": lambda some: _plain(model, tokenizer, some, table, (SCORES,)),
        "ours": lambda some: _ours(scorer, some),
    }
    for run in variants.values():
        run(texts[:20])  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    work: dict[str, list[float]] = {name: [] for name in variants}
    found: dict[str, Scores] = {}
    for repeat in range(options.repeats):
        for name, run in variants.items():
            _settle(model)
            start, worked = time.perf_counter(), time.process_time()
            found[name] = run(texts)
            _settle(model)
            seconds[name].append(time.perf_counter() - start)
            work[name].append(time.process_time() - worked)
            print(
                f"{repeat + 1}/{options.repeats} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr
            )
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    return {
        "model": options.model,
        "device": str(next(model.parameters()).device),
        "dtype": str(next(model.parameters()).dtype),
        "threads": torch.get_num_threads(),
        "texts": len(texts),
        "tokens": tokens,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "tokens_per_second": {n: tokens / statistics.median(t) for n, t in seconds.items()},
        "processor_seconds": {name: statistics.median(times) for name, times in work.items()},
        "times_less_work_than_plain": _ratio(work["plain"], work["ours"]),
        "times_as_fast_as_plain": _ratio(seconds["plain"], seconds["ours"]),
        "times_as_fast_as_shared": _ratio(seconds["shared"], seconds["ours"]),
        "largest_difference": {
            name: max(
                abs(a[name] - b[name]) for a, b in zip(found["plain"], found["ours"], strict=True)
            )
            for name in SCORES
        },
    }


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def _settle(model: Any) -> None:
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


def _texts(tokenizer: Any, count: int) -> list[str]:
    """Write texts of random tokens, as long as :data:`LENGTHS` says, in a random order."""
    draws = Random(0)
    special = set(tokenizer.all_special_ids)
    words = [id_ for id_ in range(len(tokenizer)) if id_ not in special]
    texts = []
    for place in range(count):
        size = LENGTHS[place % len(LENGTHS)] - 2
        text = tokenizer.decode([draws.choice(words) for _ in range(size)])
        texts.append(text.replace("\x00", ""))
    draws.shuffle(texts)
    return texts


def _table(size: int) -> TokenFrequencies:
    counts = torch.randint(0, 1000, (size,), generator=torch.Generator().manual_seed(0)) + 1
    return TokenFrequencies(counts.double() / counts.sum(), counts > 1)


def _ours(scorer: TextScorer, texts: Sequence[str]) -> Scores:
    rows = scorer(Text(place, text) for place, text in enumerate(texts))
    return [{name: value or 0.0 for name, value in row.scores.items()} for row in rows]


@torch.no_grad()
def _plain(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    table: TokenFrequencies,
    families: Sequence[Sequence[str]],
) -> Scores:
    found: Scores = []
    device = next(model.parameters()).device
    for text in texts:
        scores: dict[str, float] = {}
        for family in families:
            ids = torch.tensor([tokenizer(text)["input_ids"][:512]], device=device)
            logits = model(ids).logits[0, :-1].float()
            scores |= _scores(logits, ids[0, 1:], text, table, family)
        found.append(scores)
    return found


def _scores(
    logits: Any, targets: Any, text: str, table: TokenFrequencies, family: Sequence[str]
) -> dict[str, float]:
    log_probs = logits.log_softmax(-1)
    tokens = log_probs.gather(-1, targets[:, None])[:, 0]
    found = {"loss": tokens.mean().item()} if "loss" in family else {}
    if "zlib" in family:
        found["zlib"] = found["loss"] / len(zlib.compress(text.encode()))
    if "mink" in family:
        found["mink"] = _lowest(tokens)
    if {"minkpp", "gapk"} & set(family):
        probs = logits.softmax(-1)
        mean = (probs * log_probs).sum(-1)
        variance = (probs * log_probs.square()).sum(-1) - mean.square()
        spread = variance.clamp_min(1e-6).sqrt()
        if "minkpp" in family:
            found["minkpp"] = _lowest((tokens - mean) / spread)
        if "gapk" in family:
            gaps = (tokens - log_probs.max(-1).values) / spread
            found["gapk"] = _lowest(gaps.unfold(0, 3, 1).mean(-1) if len(gaps) >= 3 else gaps)
    if "dcpdd" in family:
        ids = targets.tolist()
        first = [place for place, id_ in enumerate(ids) if id_ not in ids[:place]]
        weight = table.information[targets[first].cpu()].to(tokens)
        found["dcpdd"] = (tokens[first].exp() * weight).clamp_max(0.01).mean().item()
    return found


def _lowest(values: Any) -> float:
    return float(values.sort().values[: max(1, int(0.2 * len(values)))].mean())


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"small": max(1, options.megabytes // 100), "large": options.megabytes}
        peaks: dict[str, Any] = {"nothing": _apart(options, None, 0)}
        for name, megabytes in sizes.items():
            file = _large_file(Path(folder) / f"{name}.jsonl", megabytes)
            peaks[name] = _apart(options, file, options.blocks) | {"megabytes": megabytes}
    return {"model": options.model, "batch_tokens": options.batch_tokens, "peaks": peaks}


def _large_file(path: Path, megabytes: int) -> Path:
    """Write rows of one to 400 words."""
    draws = Random(0)
    words = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "with", "not", "his")
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            text = " ".join(draws.choice(words) for _ in range(draws.randint(1, 400)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def _apart(options: argparse.Namespace, file: Path | None, blocks: int) -> dict[str, Any]:
    """Score the first blocks of a file in a fresh process; give its peak memory."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_score_start, args=(options, file, blocks, results))
    process.start()
    found: dict[str, Any] = results.get()
    process.join()
    print(f"{file.name if file else 'nothing'}: {found}", file=sys.stderr)
    return found


def _score_start(options: argparse.Namespace, file: Path | None, blocks: int, results: Any) -> None:
    torch.set_num_threads(options.threads or torch.get_num_threads())
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    settings = Settings(scores=SCORES[:-1], batch_tokens=options.batch_tokens)
    scorer = TextScorer.of(model, tokenizer, settings)
    start = time.perf_counter()
    taken = islice(scorer.blocks(Inputs(str(file)).texts()), blocks) if file else []
    rows = [len(block) for block in taken]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put({"peak_mib": round(peak), "texts": sum(rows), "blocks": len(rows),
                 "seconds": round(time.perf_counter() - start, 2)})  # fmt: skip


if __name__ == "__main__":
    main()
