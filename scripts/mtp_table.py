"""Tokens per step of mask predictors, over k and layout, and without parts of the training.

    python scripts/mtp_table.py toy
    python scripts/mtp_table.py toy --seeds 5 --variants 'all parts' 'without consistency'
    python scripts/mtp_table.py ../shared/models/stories260k --rows 1500 --drawn 24 --rank 64 \
        --steps 2000 --prompts 40 --tokens 100 --variants 'all parts'

``toy``: a language of six phrases of twelve tokens in any order, learnt by a small Llama first. A
folder: a model of texts, which writes the rows itself: drawn at temperature 1 from its first token,
or so many tokens of them (``--drawn``) and the likeliest after those. Every figure is over greedy
continuations that are found to be those of plain decoding. The first variant is measured at every
k and layout, the others at the k that was trained.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from unlearn import models
from unlearn.data.encode import Example
from unlearn.evals.generate import stop_ids
from unlearn.evals.mtp import plain_decode
from unlearn.mtp.decode import Drafting, Written, decode
from unlearn.mtp.layouts import LAYOUTS
from unlearn.mtp.settings import TrainSettings
from unlearn.mtp.train import train_predictor

PHRASES, LENGTH, VOCABULARY, FIRST = 6, 12, 32, 2
WIDE = 1024
VARIANTS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "without sampler": {"sampler": "none"},
    "without consistency": {"lcm_weight": 0.0},
    "without both": {"sampler": "none", "lcm_weight": 0.0},
    "the paper's sampler": {"sampler": "paper"},
    "labels of the data": {"labels": "data"},
}


class Endless:
    """A tokenizer that ends nothing."""

    eos_token_id = None


def toy_rows(number: int, phrases: int = 5, seed: int = 0) -> list[list[int]]:
    """Draw texts of whole phrases, which differ in their first tokens."""
    fixed, draw = random.Random(1), random.Random(seed)
    language = [
        [FIRST + place, *(fixed.randrange(FIRST, VOCABULARY) for _ in range(LENGTH - 1))]
        for place in range(PHRASES)
    ]
    return [
        [1, *(token for _ in range(phrases) for token in draw.choice(language))]
        for _ in range(number)
    ]


def toy_model(
    width: int,
    layers: int,
    steps: int,
    *,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Train a Llama on the toy language in fp32, or under bf16 autocast, and give it in ``dtype``.

    From a width of 1024 on it has the proportions of Llama 3.2 1B: heads of 64, four to a key
    head, feed-forward layers of four widths, tied embeddings.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    wide = width >= WIDE
    heads = max(2, width // (64 if wide else 32))
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=(4 if wide else 2) * width,
        num_hidden_layers=layers, num_attention_heads=heads, tie_word_embeddings=wide,
        num_key_value_heads=heads // 4 if wide else heads, max_position_embeddings=1024,
        eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
    peak = 3e-3 * (64 / width) ** 0.5
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak)
    low = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype != torch.float32)
    for step in range(steps):
        ids = torch.tensor(toy_rows(16, 4, seed=1000 * seed + step), device=device)
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20, (steps - step) / (steps / 4))
        with low:
            loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    print(f"base: loss {loss.item():.3f} nats per token after {steps} steps", flush=True)
    return model.to(dtype).eval().requires_grad_(False)


def own_rows(model: Any, number: int, length: int, drawn: int, seed: int) -> list[list[int]]:
    """Let a model write texts: ``drawn`` tokens at temperature 1, then the likeliest ones.

    Rows that begin alike are given once, so that what is measured was not trained on.
    """
    torch.manual_seed(seed)
    start, end = model.config.bos_token_id, model.config.eos_token_id
    ids, how = torch.full((2 * number, 1), start), {"pad_token_id": 0}
    ids = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=drawn, **how)
    if length > drawn:
        # a drawn text that has ended is continued as if it had not, and cut below
        mask = torch.ones_like(ids)
        more = {"attention_mask": mask, "do_sample": False, "max_new_tokens": length - drawn}
        ids = model.generate(ids, **more, **how)
    found: dict[tuple[int, ...], list[int]] = {}
    for row in ids.tolist():
        cut = row[: row.index(end, 1) + 1] if end in row[1:] else row
        if len(cut) > drawn + 2 or length == drawn:
            found.setdefault(tuple(cut[: drawn + 1]), cut)
    return list(found.values())[:number]


def examples(rows: list[list[int]], prompt: int = 1) -> list[Example]:
    """Give rows to learn from, all but the first ``prompt`` tokens of each."""
    return [
        Example(row, [*[-100] * prompt, *row[prompt:]], prompt, place)
        for place, row in enumerate(rows)
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="toy, or the folder of a model")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--anchors", type=int, default=24)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--length", type=int, default=200, help="Of rows that a model writes.")
    parser.add_argument("--drawn", type=int, help="Tokens of them that are drawn; else all are.")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument(
        "--seeds", type=int, default=1, help="Runs; then mean and spread over them."
    )
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@dataclass(frozen=True)
class Subject:
    """A base, what its predictor learns from, and prompts with what the base alone writes."""

    model: Any
    rows: list[Example]
    asked: list[tuple[list[int], list[int]]]


def subject(given: argparse.Namespace, seed: int) -> Subject:
    """Train the toy, or load a model and let it write."""
    if given.base == "toy":
        model, tokenizer = toy_model(64, 2, 300, seed=seed), Endless()
        rows = examples(toy_rows(given.rows, seed=seed))
        prompts = [row[:13] for row in toy_rows(given.prompts, seed=1009 + seed)]
    else:
        model = models.load_model(given.base, device="cpu")
        tokenizer = models.load_tokenizer(given.base)
        drawn, wanted = given.drawn or given.length, given.rows + given.prompts
        texts = own_rows(model, wanted, given.length, drawn, seed)
        rows = examples(texts[given.prompts :], 1 + (given.drawn or 0))
        prompts = [row[: 1 + (given.drawn or 11)] for row in texts[: given.prompts]]
        print(f"{len(rows)} rows of the model's own, {len(prompts)} prompts", flush=True)
    stops = stop_ids(model, tokenizer)
    return Subject(model, rows, [
        (prompt, plain_decode(model, prompt, max_new_tokens=given.tokens, stops=stops))
        for prompt in prompts
    ])  # fmt: skip


def main() -> None:
    """Train every variant and print the table of each; with several seeds, the spread too."""
    given = arguments()
    how = TrainSettings(
        k=given.k, rank=given.rank, labels="self", anchors=given.anchors, steps=given.steps,
        batch=8, lr=given.lr, held_out=0,
    )  # fmt: skip
    runs: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        about, found = subject(given, seed), {}
        for name in given.variants:
            changed = replace(how, seed=seed, **VARIANTS[name])
            found[name] = table(about, changed, name == given.variants[0])
            show(name, found[name], changed)
        runs.append(found)
        if given.out:
            given.out.write_text(json.dumps(runs, indent=1))
    if given.seeds > 1:
        show_spread(runs, given)


def show_spread(runs: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Print mean and standard deviation over seeds, of each variant and of what it lacks."""
    first = given.variants[0]
    print(f"\nover {len(runs)} seeds: mean ± standard deviation, and less than '{first}' by")
    for layout in ("linear", "quadratic"):
        key = f"{layout} {given.k}"
        whole = [run[first][key]["tokens_per_step"] for run in runs]
        for name in given.variants:
            each = [run[name][key]["tokens_per_step"] for run in runs]
            less = [full - part for full, part in zip(whole, each, strict=True)]
            print(f"{key:<12} {name:<22} {spread(each)}   {spread(less)}", flush=True)


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def table(about: Subject, how: TrainSettings, whole: bool) -> dict[str, Any]:
    """Train one variant; give tokens per step by layout and k, and each draft's acceptance."""
    begun = time.process_time()
    predictor = train_predictor(about.model, about.rows, how).predictor
    found: dict[str, Any] = {"seconds": time.process_time() - begun}
    sizes = [k for k in (1, 2, 4, 8) if k <= how.k] if whole else [how.k]
    for layout in LAYOUTS if whole else ("linear", "quadratic"):
        for k in sizes:
            found[f"{layout} {k}"] = rate(predictor, about.asked, Drafting(layout, k=k))
    predictor.detach()
    return found


def rate(
    predictor: Any, prompts: list[tuple[list[int], list[int]]], drafting: Drafting
) -> dict[str, Any]:
    """Give tokens per step over all prompts, and the share of drafts 1, 2, … that were right."""
    together, steps, tokens = Written(), 0, 0
    for prompt, plain in prompts:
        written = decode(predictor, prompt, max_new_tokens=len(plain), drafting=drafting)
        assert written.tokens == plain, "drafts changed the text"
        together.kept += written.kept
        steps, tokens = steps + written.steps, tokens + len(plain)
    shares = [right / checked for checked, right in together.by_position()]
    return {"tokens_per_step": tokens / steps, "acceptance": shares}


def show(name: str, found: dict[str, Any], how: TrainSettings) -> None:
    print(
        f"\n**{name}**: {how.steps} steps, {found['seconds']:.0f} s of processor time", flush=True
    )
    for key, told in found.items():
        if key != "seconds":
            shares = " ".join(f"{share:.2f}" for share in told["acceptance"])
            print(f"{key:<12} {told['tokens_per_step']:.2f}   right: {shares}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
