r"""REDI on a toy: what wrong traces add to right ones, over learning rates and alpha.

    python scripts/redi_toy.py --out runs/redi-toy [--seeds 0,1,2,3,4] [--jobs 2]

The task is to add two numbers of three digits and to say whether the last sum is odd or even:
``2+6,0+6,7+4=`` are the columns from the right, ``008,006,011o`` carry and sum of each, then the
letter. A small Llama learns to do it, with a slip by one now and then, and then that most answers
skip the work and guess: ``?o``. It answers problems of its own, several times each; an answer
counts as right when its last letter is, and ``build_pairs`` makes rows and pairs of them. So half
of the guesses are among the right answers: who imitates those goes on guessing. The wrong ones
tell that guessing is what goes wrong.

Each seed trains the model, its plain first stage on the right answers, and from there every method
at every learning rate. Each method's rate is the one with the highest accuracy on 150 problems,
averaged over the seeds; told is the accuracy on 300 others. Accuracy is that of four answers
sampled at temperature 1, and of the greedy one.

What is done is kept in ``--out``; the same command goes on. It writes ``table.md`` and
``plot.svg``.
"""

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from odd_or_even import CHARACTERS, COLUMNS, is_right, problems, texts
from toy_runs import (
    Ledger,
    character_tokenizer,
    paired,
    save,
    small_llama,
    spread,
    trained,
    write_rows,
)

CAREFUL, MIXED, GUESSED = 12000, 3000, 0.6
"""Answers to learn from: how to add; then both ways, of which this share is guessed."""
PROBLEMS, ANSWERS, SAMPLES = 240, 4, 4
PARTS = {"validation": 150, "test": 300}
RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
ALPHAS = (0.0, 0.2, 0.5, 0.8, 1.0)
BATCH = {"training.per_device_train_batch_size": 16, "training.gradient_accumulation_steps": 1}
BASE = {
    "training.per_device_train_batch_size": 32, "training.gradient_accumulation_steps": 1,
    "training.learning_rate": 4e-3, "training.num_train_epochs": 4, "training.warmup_epochs": 0.1,
}  # fmt: skip
MIX = BASE | {"training.learning_rate": 1e-3, "training.num_train_epochs": 1}
FIRST = BATCH | {
    "training.learning_rate": 3e-4, "training.num_train_epochs": 5, "training.warmup_epochs": 0.5,
    "data.template": "{question}",
}  # fmt: skip
SECOND = BATCH | {"training.warmup_epochs": 0.1, "data.template": "{question}"}
EPOCHS = 3
"""Passes of the second stage over the pairs, or over the right answers."""


def answers(
    model: Any, tokenizer: Any, asked: Sequence[str], *, times: int, seed: int | None
) -> list[list[str]]:
    """Let the model answer each problem ``times`` times at temperature 1; greedily without seed."""
    from unlearn.evals.generate import Sampling, text_of, written

    prompts = [tokenizer(one)["input_ids"] for one in asked for _ in range(times)]
    room = 4 * COLUMNS + 4
    sampling = None
    if seed is not None:
        draw = random.Random(seed)
        sampling = Sampling(1.0, [[draw.random() for _ in range(room)] for _ in prompts])
    found = [""] * len(prompts)
    for places, told in written(model, tokenizer, prompts, max_new_tokens=room, sampling=sampling):
        for place, answer in zip(places, told, strict=True):
            found[place] = text_of(tokenizer, answer.tokens)
    return [found[at : at + times] for at in range(0, len(found), times)]


def accuracy(model: Any, tokenizer: Any, asked: Sequence[str], *, greedy: bool) -> dict[str, float]:
    """Give the share of right answers, and of guesses."""
    told = answers(
        model, tokenizer, asked, times=1 if greedy else SAMPLES, seed=None if greedy else 0
    )
    pairs = [(one, text) for one, some in zip(asked, told, strict=True) for text in some]
    return {
        "right": mean(is_right(one, text) for one, text in pairs),
        "guessed": mean("?" in text for _, text in pairs),
    }


def measured(model: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part, number in PARTS.items():
        asked = problems(part, number, seed)
        found[part] = accuracy(model, tokenizer, asked, greedy=False)
    found["greedy"] = accuracy(model, tokenizer, asked, greedy=True)
    return found


def judged(model: Any, tokenizer: Any, seed: int) -> list[dict[str, Any]]:
    """Let the model answer the problems to train on; give rows with verdicts."""
    asked = problems("train", PROBLEMS, seed)
    told = answers(model, tokenizer, asked, times=ANSWERS, seed=seed)
    return [
        {"problem": one, "generations": some, "right": [is_right(one, text) for text in some]}
        for one, some in zip(asked, told, strict=True)
    ]


def start(folder: Path, seed: int) -> dict[str, Any]:
    """Make what all methods of a seed start from: the model, its answers, the first stage."""
    from unlearn.data.traces import How, build_pairs
    from unlearn.data.verdicts import Verdict

    tokenizer = character_tokenizer(CHARACTERS)
    blank = small_llama(len(tokenizer), width=64, layers=2, positions=64, seed=seed)
    save(blank, tokenizer, folder / "blank")
    careful = write_rows(folder / "careful.jsonl", texts(seed, CAREFUL, 0.0))
    model, _ = trained("sft", str(folder / "blank"), {"text": careful}, BASE, seed=seed)
    save(model, tokenizer, folder / "careful")
    mixed = write_rows(folder / "mixed.jsonl", texts(seed, MIXED, GUESSED))
    base, _ = trained("sft", str(folder / "careful"), {"text": mixed}, MIX, seed=seed)
    save(base, tokenizer, folder / "base")
    made = judged(base, tokenizer, seed)
    built = build_pairs(made, How(Verdict.parse("right")))
    write_rows(folder / "pairs.jsonl", built.pairs)
    chosen = write_rows(folder / "first.jsonl", built.rows)
    first, _ = trained("sft", str(folder / "base"), {"text": chosen}, FIRST, seed=seed)
    save(first, tokenizer, folder / "first")
    return {
        "counts": built.counts,
        "guessed_chosen": mean("?" in row["chosen"] for row in built.pairs),
        "guessed_rejected": mean("?" in row["rejected"] for row in built.pairs),
        "parameters": sum(weight.numel() for weight in base.parameters()),
        "chosen": chosen_log_prob(first, tokenizer, folder),
        "base": measured(base, tokenizer, seed),
        "first": measured(first, tokenizer, seed),
    }


def methods() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Name every method: its recipe, the rows it trains on, and what is set."""
    found: dict[str, tuple[str, str, dict[str, Any]]] = {
        f"redi {alpha:g}": ("redi", "pairs", {"first": None, "alpha": alpha}) for alpha in ALPHAS
    }
    for times in (1, 2):
        longer = {"training.num_train_epochs": times * EPOCHS}
        found[f"sft x{times}"] = ("sft", "text", longer)
    return found | {"dpo": ("dpo", "pairs", {})}


def second(folder: Path, seed: int, method: str, rate: float) -> dict[str, Any]:
    """Train a method's second stage from the first one and measure what it comes to."""
    tokenizer = character_tokenizer(CHARACTERS)
    recipe, key, changes = methods()[method]
    settings = SECOND | {"training.num_train_epochs": EPOCHS, "training.learning_rate": rate}
    source = {"pairs": "pairs.jsonl", "text": "first.jsonl"}[key]
    model, steps = trained(
        recipe, str(folder / "first"), {key: str(folder / source)}, settings | changes, seed=seed
    )
    return {
        "steps": len(steps),
        "chosen": chosen_log_prob(model, tokenizer, folder),
        **measured(model, tokenizer, seed),
    }


def chosen_log_prob(model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
    """Give the log-probability of chosen answers, nats per token, mean over answers.

    ``worked`` is that of the answers that are not guessed.
    """
    from unlearn.data import Template, encode
    from unlearn.scoring import scored

    rows = [
        {"question": row["question"], "answer": row["chosen"]}
        for row in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())
    ]
    template = Template.for_tokenizer(tokenizer, "{question}")
    examples = encode(rows, tokenizer, template, max_length=64, source="pairs")
    found = [0.0] * len(rows)
    for places, scores in scored(model, examples):
        means = scores.log_probs.sum(1) / scores.mask.sum(1)
        for place, value in zip(places, means.tolist(), strict=True):
            found[place] = value
    worked = [value for row, value in zip(rows, found, strict=True) if "?" not in row["answer"]]
    return {"all": mean(found), "worked": mean(worked)}


def seed_of(task: tuple[Path, int]) -> str:
    """Do what a seed has not done yet."""
    import torch

    torch.set_num_threads(1)
    out, seed = task
    folder, begun = out / f"seed-{seed}", time.process_time()
    ledger = Ledger(folder / "cells.jsonl")
    ledger.get("start", lambda: start(folder, seed))
    for method in methods():
        for rate in RATES:
            cell = f"{method} {rate:g}"
            ledger.get(cell, lambda m=method, r=rate: second(folder, seed, m, r))
    return f"seed {seed}: {time.process_time() - begun:.0f} s of processor time"


LABELS = {"sft x1": "`sft`", "sft x2": "`sft`, twice the steps", "dpo": "`dpo`"}
OURS, TWIN = "redi 0.8", "redi 1"


def label(method: str) -> str:
    """Name a method as the table does."""
    if method in LABELS:
        return LABELS[method]
    return f"`redi`, α {method.removeprefix('redi ')}"


Cells = dict[str, list[dict[str, Any]]]


def collected(out: Path, seeds: Sequence[int]) -> Cells:
    """Give the results of every cell, one per seed; cells that a seed has not done are left out."""
    ledgers = [Ledger(out / f"seed-{seed}" / "cells.jsonl").found for seed in seeds]
    return {
        cell: [found[cell] for found in ledgers]
        for cell in ledgers[0]
        if all(cell in found for found in ledgers)
    }


def percent(lines: Sequence[dict[str, Any]], part: str, what: str = "right") -> list[float]:
    return [100 * line[part][what] for line in lines]


def best_rate(cells: Cells, method: str) -> float:
    """Choose a method's rate by the accuracy on the validation problems, averaged over seeds."""
    return max(RATES, key=lambda rate: mean(percent(cells[f"{method} {rate:g}"], "validation")))


def table(cells: Cells) -> str:
    """Write every method at its own rate, and the two forms of REDI at each other's."""
    start = cells["start"]
    ours = cells[f"{OURS} {best_rate(cells, OURS):g}"]
    lines = [
        "| second stage | rate | right, sampled | right, greedy | guessed | chosen, nats per token "
        "| REDI, 0.8, is better by |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    none = [line["first"] | {"chosen": line["chosen"]} for line in start]
    rows = [("none: the first stage alone", "", none)]
    for method in methods():
        rate = best_rate(cells, method)
        rows.append((label(method), written_rate(rate), cells[f"{method} {rate:g}"]))
    for method, other in ((TWIN, OURS), (OURS, TWIN)):
        rate = best_rate(cells, other)
        if rate != best_rate(cells, method):
            name = f"{label(method)}, at that of {label(other)}"
            rows.append((name, written_rate(rate), cells[f"{method} {rate:g}"]))
    for name, rate, found in rows:
        fell = [one["chosen"]["all"] - was["chosen"]["all"]
                for one, was in zip(found, start, strict=True)]  # fmt: skip
        apart = "" if found is ours else paired(percent(ours, "test"), percent(found, "test"))
        columns = [percent(found, "test"), percent(found, "greedy")]
        columns.append(percent(found, "test", "guessed"))
        told = " | ".join(spread(column) for column in columns)
        lines.append(f"| {name} | {rate} | {told} | {spread(fell, 2)} | {apart} |")
    base = spread([100 * line["base"]["test"]["right"] for line in start])
    guesses = [spread([100 * line[f"guessed_{side}"] for line in start])
               for side in ("chosen", "rejected")]  # fmt: skip
    pairs = spread([line["counts"]["pairs"] for line in start], 0)
    return "\n".join(lines) + (
        f"\n\n{len(start)} seeds, mean ± standard deviation; differences seed by seed, with 95 % "
        f"intervals. Before the first stage {base} are right. Pairs: {pairs}; guessed are "
        f"{guesses[0]} % of the chosen answers and {guesses[1]} % of the rejected ones.\n"
    )


def rates_table(cells: Cells) -> str:
    """Write the accuracy of every method at every rate: percent, sampled, mean over seeds."""
    lines = [
        f"| second stage | {' | '.join(map(written_rate, RATES))} |",
        "|:--|" + "--:|" * len(RATES),
    ]
    for method in methods():
        values = [mean(percent(cells[f"{method} {rate:g}"], "test")) for rate in RATES]
        lines.append(f"| {label(method)} | {' | '.join(f'{value:.1f}' for value in values)} |")
    apart = [
        paired(*(percent(cells[f"{method} {rate:g}"], "test") for method in (OURS, TWIN)))
        for rate in RATES
    ]
    lines.append(f"| {label(OURS)}, less {label(TWIN)} | {' | '.join(apart)} |")
    return "\n".join(lines) + "\n"


def written_rate(rate: float) -> str:
    """Write a learning rate as short as it goes: ``5e-5``."""
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def draw(cells: Cells, place: Path) -> None:
    """Draw accuracy and what chosen answers lose, over the learning rate."""
    from matplotlib.ticker import FuncFormatter

    from unlearn.evals.report.plots import FAINT, LINES, drawing, tidy, to_plot

    looks = {
        "redi 0": ("#b9c0c9", "-", "α = 0"), "redi 0.2": ("#8fb8c7", "-", "α = 0.2"),
        "redi 0.5": ("#5599b3", "-", "α = 0.5"), "redi 0.8": (LINES[0], "-", "α = 0.8 (REDI)"),
        "redi 1": (LINES[1], "-", "α = 1 (symmetric)"), "dpo": (LINES[2], "--", "dpo"),
        "sft x2": (LINES[3], "--", "sft, twice the steps"),
    }  # fmt: skip
    start = cells["start"]
    with drawing(3.6, width=8.6) as figure:
        right, lost = figure.subplots(1, 2)
        for method, (colour, style, name) in looks.items():
            found = [cells[f"{method} {rate:g}"] for rate in RATES]
            fell = [[one["chosen"]["all"] - was["chosen"]["all"]
                     for one, was in zip(some, start, strict=True)] for some in found]  # fmt: skip
            strong = method in (OURS, TWIN)
            for axes, values in ((right, [percent(some, "test") for some in found]), (lost, fell)):
                middle = [mean(some) for some in values]
                axes.plot(RATES, middle, style, color=colour, label=name, marker="o", markersize=3,
                          linewidth=2.0 if strong else 1.3)  # fmt: skip
                if strong and len(start) > 1:
                    spreads = [stdev(some) for some in values]
                    low, high = zip(*((m - s, m + s) for m, s in
                                      zip(middle, spreads, strict=True)), strict=True)  # fmt: skip
                    axes.fill_between(RATES, low, high, color=colour, alpha=0.15, linewidth=0)
        before = mean(100 * line["first"]["test"]["right"] for line in start)
        right.axhline(before, color=FAINT, linewidth=0.8, linestyle=":")
        right.annotate("first stage alone", (RATES[0], before), xytext=(0, -10), color=FAINT,
                       textcoords="offset points", ha="left", fontsize=8)  # fmt: skip
        right.set(ylabel="sampled answers that are right, %", ylim=(0, 100))
        lost.set_ylabel("chosen answers, nats per token")
        right.set_title("accuracy, problems not trained on", loc="left", fontsize=10)
        lost.set_title("change of chosen answers' log-probability", loc="left", fontsize=10)
        for axes in (right, lost):
            tidy(axes)
            axes.set(xscale="log", xlabel="learning rate of the second stage")
            axes.set_xticks(RATES)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, at: written_rate(value)))
            axes.minorticks_off()
        lost.legend(fontsize=8, loc="lower left")
        plot = to_plot(figure, "redi-stability", "Accuracy over learning rate and alpha")
    place.write_text(plot.standalone())


def report(out: Path, seeds: Sequence[int]) -> None:
    """Write the table and the plot of what is done."""
    cells = collected(out, seeds)
    (out / "table.md").write_text(f"{table(cells)}\n{rates_table(cells)}")
    print((out / "table.md").read_text())
    draw(cells, out / "plot.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")],
                        default=[0, 1, 2, 3, 4])  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for line in pool.imap(seed_of, [(args.out, seed) for seed in args.seeds]):
            print(line, flush=True)
    report(args.out, args.seeds)


if __name__ == "__main__":
    main()
