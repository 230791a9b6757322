r"""Rows that count by their losses, on a toy: text with redundant and noisy rows, against plain.

    python scripts/reweight_toy.py --tofu ../shared/data/tofu --out runs/reweight-toy [--jobs 2]

Rows are answers of TOFU, cut at 80 characters. Of 4000 rows, 60 % are near-copies of 20 answers (a
word left out), 3 % have their characters shuffled, and 37 % are answers of their own. A small Llama
learns to write them, one character after the other, from nothing. Every 20 steps the loss of 128
answers that no row comes from is measured, in nats per character.

Each seed draws its rows and its weights and trains with every strategy, for as many steps on the
same rows in the same order. Told is after how many steps a strategy has come to the loss with which
plain training ends, between two measurements by a straight line. Plain training is `sft`; that
``strategy: uniform`` gives the same weights, bit for bit, is checked on every seed.

What is done is kept in ``--out``; the same command goes on. It writes ``table.md`` and
``plot.svg``.
"""

import argparse
import multiprocessing
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from toy_runs import (
    Ledger,
    character_tokenizer,
    paired,
    save,
    small_llama,
    spread,
    trained,
    weights_sha256,
    write_rows,
)

ROWS, LENGTH, COPIED, HELDOUT = 4000, 80, 20, 128
COPIES, NOISE = 0.60, 0.03
STEPS, EVERY, BATCH, CHECKED = 320, 20, 32, 30
STRATEGIES = ("sft", "linupper", "quadratic", "upper", "extremes")
TRAINING = {
    "training.per_device_train_batch_size": BATCH, "training.gradient_accumulation_steps": 1,
    "training.learning_rate": 2e-3, "training.warmup_steps": 20,
    "training.lr_scheduler_type": "constant_with_warmup",
}  # fmt: skip


def rows(texts: Sequence[str], seed: int) -> tuple[list[dict[str, str]], list[str]]:
    """Draw rows of the three kinds, mixed, and the texts that are held out."""
    draw = random.Random(seed)
    order = draw.sample(list(texts), len(texts))
    held, copied, plain = order[:HELDOUT], order[HELDOUT:][:COPIED], order[HELDOUT + COPIED :]
    copies, noise = round(COPIES * ROWS), round(NOISE * ROWS)
    own = ROWS - copies - noise
    made = [("copy", near_copy(draw.choice(copied), draw)) for _ in range(copies)]
    made += [("noise", shuffled(text, draw)) for text in plain[:noise]]
    made += [("own", text) for text in plain[noise:][:own]]
    draw.shuffle(made)
    return [{"kind": kind, "text": text} for kind, text in made], held


def near_copy(text: str, draw: random.Random) -> str:
    """Leave one word out."""
    words = text.split(" ")
    del words[draw.randrange(len(words))]
    return " ".join(words)


def shuffled(text: str, draw: random.Random) -> str:
    """Put the characters into another order."""
    return "".join(draw.sample(text, len(text)))


def read_texts(tofu: str) -> list[str]:
    """Give the answers of TOFU, cut, each once."""
    from unlearn.data.sources import load_rows

    found = (row["answer"][:LENGTH] for row in load_rows(f"{tofu}#full:train"))
    return [text for text in dict.fromkeys(found) if len(text) == LENGTH]


def start(folder: Path, tofu: str, seed: int) -> dict[str, Any]:
    """Write what all runs of a seed share: rows, held-out rows, a model that knows nothing."""
    texts = read_texts(tofu)
    drawn, held = rows(texts, seed)
    write_rows(folder / "rows.jsonl", drawn)
    write_rows(folder / "held.jsonl", [{"text": text} for text in held])
    tokenizer = character_tokenizer("".join(sorted(set("".join(texts)))))
    model = small_llama(len(tokenizer), width=64, layers=2, positions=128, seed=seed)
    save(model, tokenizer, folder / "blank")
    return {"texts": len(texts), "parameters": sum(weight.numel() for weight in model.parameters())}


def run(folder: Path, seed: int, strategy: str, steps: int) -> dict[str, Any]:
    """Train with a strategy (``sft``: without any); give the losses on the way."""
    from unlearn.data import Template, encode, load_rows
    from unlearn.models import load_tokenizer
    from unlearn.scoring import scored

    blank = str(folder / "blank")
    tokenizer = load_tokenizer(blank)
    held = encode(
        load_rows(str(folder / "held.jsonl")), tokenizer, Template.for_tokenizer(tokenizer),
        max_length=128, source="held",
    )  # fmt: skip
    curve: list[tuple[int, float]] = []

    def measure(model: Any, step: int) -> None:
        parts = [(-s.log_probs.sum().item(), s.mask.sum().item()) for _, s in scored(model, held)]
        curve.append((step, sum(part for part, _ in parts) / sum(n for _, n in parts)))

    settings = TRAINING | {"training.max_steps": steps}
    if strategy != "sft":
        settings["terms.text.reweight.strategy"] = strategy
    begun = time.process_time()
    model, events = trained(
        "sft" if strategy == "sft" else "reweight", blank,
        {"text": str(folder / "rows.jsonl")}, settings, seed=seed, every=EVERY, on_step=measure,
    )  # fmt: skip
    measure(model, steps)
    return {
        "curve": curve,
        "effective": mean(event.get("text/weight_ess", 1.0) for event in events[-100:]),
        "sha256": weights_sha256(model),
        "seconds": time.process_time() - begun,
    }


def seed_of(task: tuple[Path, str, int]) -> str:
    """Do what a seed has not done yet."""
    import torch

    torch.set_num_threads(1)
    out, tofu, seed = task
    folder, begun = out / f"seed-{seed}", time.process_time()
    ledger = Ledger(folder / "cells.jsonl")
    ledger.get("start", lambda: start(folder, tofu, seed))
    for strategy in ("sft", "uniform"):
        ledger.get(f"check {strategy}", lambda s=strategy: run(folder, seed, s, CHECKED))
    for strategy in STRATEGIES:
        ledger.get(strategy, lambda s=strategy: run(folder, seed, s, STEPS))
    return f"seed {seed}: {time.process_time() - begun:.0f} s of processor time"


def reached(curve: Sequence[tuple[int, float]], goal: float) -> float | None:
    """Give the step at which a loss was first come to, on straight lines; None: never."""
    if curve[0][1] <= goal:
        return float(curve[0][0])
    for (step, high), (later, low) in pairwise(curve):
        if low <= goal < high:
            return step + (later - step) * (high - goal) / (high - low)
    return None


def report(out: Path, seeds: Sequence[int]) -> None:
    """Write the table and the plot of what is done."""
    found = [Ledger(out / f"seed-{seed}" / "cells.jsonl").found for seed in seeds]
    (out / "table.md").write_text(table(found))
    print((out / "table.md").read_text())
    draw(found, out / "plot.svg")


def table(found: Sequence[dict[str, Any]]) -> str:
    """Write the loss in the end and when that of plain training was come to."""
    plain = [cells["sft"]["curve"][-1][1] for cells in found]
    lines = [
        "| strategy | loss in the end | less than plain training by | steps to its loss | "
        "effective share of rows |",
        "|:--|--:|--:|--:|--:|",
    ]
    for strategy in STRATEGIES:
        ends = [cells[strategy]["curve"][-1][1] for cells in found]
        steps = [reached(cells[strategy]["curve"], goal)
                 for cells, goal in zip(found, plain, strict=True)]  # fmt: skip
        there = [step for step in steps if step is not None]
        missed = len(steps) - len(there)
        told = [spread(there, 0)] if there else []
        told += [f"never on {missed}"] if missed else []
        name = "`sft`, plain" if strategy == "sft" else f"`{strategy}`"
        cells = [
            name,
            spread(ends, 3),
            "" if strategy == "sft" else paired(plain, ends, 3),
            ", ".join(told),
            f"{mean(cells[strategy]['effective'] for cells in found):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    same = sum(cells["check sft"]["sha256"] == cells["check uniform"]["sha256"] for cells in found)
    return "\n".join(lines) + (
        f"\n\n{len(found)} seeds, {STEPS} steps, mean ± standard deviation; differences seed by "
        f"seed, with 95 % intervals. `strategy: uniform` and `sft` gave the same weights bit for "
        f"bit on {same} of {len(found)} seeds ({CHECKED} steps).\n"
    )


def draw(found: Sequence[dict[str, Any]], place: Path) -> None:
    """Draw the losses, and by how much each is below that of plain training."""
    from unlearn.evals.report.plots import FAINT, INK, LINES, drawing, tidy, to_plot

    looks = dict(zip(STRATEGIES, (INK, *LINES), strict=True))
    steps = [step for step, _ in found[0]["sft"]["curve"]]
    with drawing(3.4, width=8.6) as figure:
        whole, below = figure.subplots(1, 2)
        for strategy, colour in looks.items():
            losses = [[loss for _, loss in cells[strategy]["curve"]] for cells in found]
            middle = [mean(at) for at in zip(*losses, strict=True)]
            plain = strategy == "sft"
            name = "plain" if plain else strategy
            whole.plot(steps, middle, "--" if plain else "-", color=colour, label=name)
            if plain:
                continue
            apart = [
                [one - other for (_, one), (_, other) in
                 zip(cells[strategy]["curve"], cells["sft"]["curve"], strict=True)]
                for cells in found
            ]  # fmt: skip
            for line in apart:
                below.plot(steps, line, color=colour, alpha=0.25, linewidth=0.7)
            below.plot(steps, [mean(at) for at in zip(*apart, strict=True)], color=colour)
        goal = mean(cells["sft"]["curve"][-1][1] for cells in found)
        whole.axhline(goal, color=FAINT, linewidth=0.8, linestyle=":")
        below.axhline(0, color=INK, linewidth=1, linestyle="--")
        whole.set(ylabel="nats per character", ylim=(goal - 0.2, goal + 0.9))
        below.set(ylabel="nats per character")
        whole.set_title("loss on texts held out", loc="left", fontsize=10)
        below.set_title("the same, less that of plain training", loc="left", fontsize=10)
        for axes in (whole, below):
            tidy(axes)
            axes.set_xlabel("steps")
        whole.legend(fontsize=9)
        plot = to_plot(figure, "reweighting", "Loss over steps by strategy")
    place.write_text(plot.standalone())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tofu", required=True, help="the folder of the TOFU data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")],
                        default=[0, 1, 2, 3, 4])  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for line in pool.imap(seed_of, [(args.out, args.tofu, seed) for seed in args.seeds]):
            print(line, flush=True)
    report(args.out, args.seeds)


if __name__ == "__main__":
    main()
