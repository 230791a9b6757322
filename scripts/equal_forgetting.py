r"""Bring methods to one forget probability, and see what each has done to the rows to be kept.

    python scripts/equal_forgetting.py --target ../shared/models/tofu-tiny-target \
        --tofu ../shared/data/tofu --out runs/equal [--seeds 0,1,2,3,4] [--jobs 2] [--only kfac npo]

The forget set is TOFU's ``forget05``, 200 rows. Of the first 400 rows of TOFU, which the tiny
target has memorised too, every seed draws 80 that no method sees: KL(target || model) is measured
on them, in nats per labelled token. The other 320 are the retain set, for training and for
curvature alike.

First NPO is run as its preset says; the mean probability of its forget answers is the goal. Every
other method has one dial (the weight of its forget term, or the forget loss that K-FADE goes to),
which is turned until its own probability is within 0.015 of the goal, at most six times; what is
nearest counts, and is marked where it is not within 0.02. Rivals with a KL term in place of the
retain loss are tuned first, on the first seed: all their ``choices`` are brought to the goal and
the one with the least KL *on the rows drawn* is kept, which favours them. K-FADE is not tuned.

Every method of every seed has a process of its own, so that peak memory is its own; seconds are
those of training or of the steps, without loading and measuring, with one thread each and
``--jobs`` of them at once: compare them with each other only. With ``--utility`` the TOFU benchmark
gives model utility too (answers of at most 100 tokens), for the methods named.

What is done is kept in ``--out``; the same command goes on. It writes ``results.json``,
``table.md`` and ``plot.svg``.
"""

import argparse
import json
import math
import multiprocessing
import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from scipy.stats import t as student

FORGET, SEEN, DRAWN = "forget05", 400, 80
NEAR, MATCHED, TRIALS = 0.015, 0.02, 6


@dataclass(frozen=True)
class Method:
    """A recipe with a dial: what is turned, where it begins, and whether more of it forgets more.

    ``choices`` are settings of which the first seed keeps the best.
    """

    recipe: str
    dial: str | None
    start: float
    settings: tuple[str, ...] = ()
    choices: tuple[tuple[str, ...], ...] = ((),)
    label: str = ""


def kfade(*settings: str, start: float = 4.5, label: str) -> Method:
    fewer = ("edit.retain_kl=null", "edit.forget_rows=100", "edit.held_out=40")
    return Method("tofu-tiny/kfade", "edit.forget_nll", start, (*fewer, *settings), label=label)


RATES = tuple(
    (f"training.learning_rate={rate}", f"training.num_train_epochs={epochs}")
    for rate, epochs in ((3e-4, 4), (1e-3, 2), (1e-3, 4))
)
WITH_KL = ("terms.1.objective=kl",)
METHODS = {
    "npo": Method("tofu-tiny/npo", None, 0.3, label="NPO"),
    "grad_diff": Method("tofu-tiny/grad_diff", "terms.0.weight", 0.14, label="GradDiff"),
    "grad_diff_kl": Method("tofu-tiny/grad_diff", "terms.0.weight", 0.35, WITH_KL, RATES,
                           "GradDiff, KL term"),
    "npo_kl": Method("tofu-tiny/npo", "terms.0.weight", 0.3, WITH_KL, RATES, "NPO, KL term"),
    "kfac": kfade(label="K-FADE, `kfac`"),
    "ekfac": kfade("edit.curvature=ekfac", "edit.damping=relative:1e-2", label="K-FADE, `ekfac`"),
    "tkfac": kfade("edit.curvature=tkfac", label="K-FADE, `tkfac`"),
    "act": kfade("edit.curvature=act", "edit.damping=relative:1e-2", label="K-FADE, `act`"),
    "diag": kfade("edit.curvature=diag", "edit.damping=relative:1e-2", label="K-FADE, `diag`"),
    "plain": kfade("edit.damping=absolute:1e9", label="no metric (plain gradients)"),
    "nll": kfade("edit.ascend=nll", start=6.0, label="`kfac`, `ascend: nll`"),
    "uncorrected": kfade("edit.correct=false", label="`kfac`, `correct: false`"),
    "reuse": kfade("edit.correct=false", "edit.refit=false",
                   label="`kfac`, `correct: false`, `refit: false`"),
    "mc": kfade("edit.fisher=mc", label="`kfac`, `fisher: mc`"),
    "steps8": kfade("edit.steps=8", label="`kfac`, 8 steps"),
    "mlp": kfade("edit.layers=mlp", label="`kfac`, `layers: mlp`"),
    "paper": Method("kfade/paper", "edit.forget_nll", 6.0,
                    ("edit.layers=all-linear", "edit.forget_rows=100", "edit.held_out=40"),
                    label="`kfade/paper`"),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where the models, the rows and the results of one seed are."""

    target: str
    tofu: str
    out: Path
    seed: int

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}"

    def rows(self, part: str) -> str:
        return str(self.folder / f"{part}.jsonl")

    def found(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def draw_rows(place: Place) -> None:
    """Write the rows to be kept and those drawn from them, which no method sees."""
    from unlearn.data.sources import load_rows

    place.folder.mkdir(parents=True, exist_ok=True)
    rows = load_rows(f"{place.tofu}#full:train[:{SEEN}]")
    drawn = set(random.Random(place.seed).sample(range(len(rows)), DRAWN))
    for part, wanted in (("retain", False), ("drawn", True)):
        lines = [json.dumps(row) for at, row in enumerate(rows) if (at in drawn) == wanted]
        Path(place.rows(part)).write_text("\n".join(lines) + "\n")


def trial(place: Place, name: str, settings: list[str], dial: float) -> dict[str, Any]:
    """Run a method once; give probability, KL on the rows drawn, seconds and memory."""
    from unlearn.recipes.files import load
    from unlearn.recipes.run import run

    method = METHODS[name]
    out = place.folder / "runs" / f"{name}-{multiprocessing.current_process().pid}"
    shutil.rmtree(out, ignore_errors=True)
    turned = [f"{method.dial}={dial!r}"] if method.dial else []
    flags = {
        "model": {"path": place.target},
        "data": {"forget": f"{place.tofu}#{FORGET}", "retain": place.rows("retain")},
        "seed": place.seed,
        "out": str(out),
    }
    recipe = load(method.recipe, [*method.settings, *settings, *turned,
                                  "evals.generate=false"], flags)  # fmt: skip
    results = run(recipe)
    training = results["training"]
    steps = [{key: one.get(key) for key in ("forget/nll", "retain/kl", "predicted_kl", "alpha")}
             for one in training["curve"]] if method.dial == "edit.forget_nll" else []  # fmt: skip
    return {
        "dial": dial,
        "probability": results["metrics"]["after"]["forget_Q_A_Prob"],
        "kl": kl_on_drawn(place, out / "model"),
        "seconds": training["seconds"],
        "peak_memory_bytes": training["peak_memory_bytes"],
        "steps": steps,
        "model": str(out / "model"),
    }


def kl_on_drawn(place: Place, model: Path) -> float:
    from unlearn.data import Template, encode, load_rows
    from unlearn.evals.retain_kl import mean_kl
    from unlearn.models import ModelSource, load_model, load_tokenizer

    tokenizer = load_tokenizer(ModelSource(place.target))
    examples = encode(load_rows(place.rows("drawn")), tokenizer, Template.for_tokenizer(tokenizer),
                      max_length=512, source="drawn")  # fmt: skip
    start, changed = (load_model(ModelSource(str(path))) for path in (place.target, model))
    return mean_kl(start, changed, examples)[0]


def matched(place: Place, name: str, goal: float | None, start: float, settings: list[str]) -> Any:
    """Turn the dial until the probability is that of the goal; give all trials, the nearest first.

    Log probability is taken to be linear in the log of the dial between and beyond two trials.
    """
    trials: list[dict[str, Any]] = []
    dial = start
    for _ in range(TRIALS if goal is not None else 1):
        trials.append(trial(place, name, settings, dial) | {"settings": settings})
        if goal is None or abs(trials[-1]["probability"] - goal) <= NEAR:
            break
        dial = next_dial(trials, goal)
    trials.sort(key=lambda one: abs(one["probability"] - (goal or 0.0)))
    return trials


def next_dial(trials: list[dict[str, Any]], goal: float) -> float:
    """Say where to look next: between the two nearest on either side, or beyond the last."""

    def at(one: dict[str, Any]) -> tuple[float, float]:
        return math.log(one["dial"]), math.log(max(one["probability"], 1e-12) / goal)

    above = [at(one) for one in trials if one["probability"] > goal]
    below = [at(one) for one in trials if one["probability"] <= goal]
    if not above or not below:
        (x, off) = max(above) if above else min(below)
        way = 0.3 if abs(off) < math.log(3) else 0.7
        return math.exp(x + way if above else x - way)
    (x, up), (y, down) = max(above), min(below)
    share = min(max(up / (up - down), 0.15), 0.85)
    return math.exp(x + share * (y - x))


def work(place: Place, utility: list[str], task: tuple[str, float | None, float, Any]) -> str:
    """Match one method on one seed, and keep what was found; models but the best go."""
    import torch

    torch.set_num_threads(1)
    name, goal, start, choices = task
    every = [matched(place, name, goal, start, list(settings)) for settings in choices]
    best = min((trials[0] for trials in every), key=lambda one: (not near(one, goal), one["kl"]))
    found = {"goal": goal, "matched": near(best, goal), "best": best,
             "trials": [one for trials in every for one in trials]}  # fmt: skip
    if name in utility:
        found["utility"] = model_utility(place, best["model"])
    place.found(name).write_text(json.dumps(found, indent=1))
    for folder in (place.folder / "runs").glob(f"{name}-*"):
        shutil.rmtree(folder)
    return f"seed {place.seed} {name}: {best['probability']:.3f} of {goal}, KL {best['kl']:.4f}"


def near(one: dict[str, Any], goal: float | None) -> bool:
    return goal is None or abs(one["probability"] - goal) <= MATCHED


def model_utility(place: Place, model: str) -> float:
    from unlearn.evals.tofu.benchmark import TofuOptions
    from unlearn.evals.tofu.run import TofuRequest, evaluate_tofu
    from unlearn.models import ModelSource

    options = TofuOptions(split=FORGET, data=place.tofu, max_new_tokens=100)
    found = evaluate_tofu(TofuRequest(ModelSource(model), options))
    return float(found["metrics"]["after"]["model_utility"])


def go(args: argparse.Namespace) -> None:
    """Do what is not done yet: NPO first, then the rest of each seed; the first seed tunes."""
    places = [Place(args.target, args.tofu, args.out, seed) for seed in args.seeds]
    context = multiprocessing.get_context("spawn")
    first = places[0]
    for group, names in ((places, ["npo"]), ([first], args.only), (places[1:], args.only)):
        waiting = []
        for place in group:
            if not Path(place.rows("drawn")).is_file():
                draw_rows(place)
            waiting += [(place, task(place, first, name)) for name in names
                        if not place.found(name).is_file()]  # fmt: skip
        with context.Pool(args.jobs, maxtasksperchild=1) as pool:
            handles = [pool.apply_async(partial(work, place, args.utility), (one,))
                       for place, one in waiting]  # fmt: skip
            for handle in handles:
                print(handle.get(), flush=True)


def task(place: Place, first: Place, name: str) -> tuple[str, float | None, float, Any]:
    """Say what is to be matched, from where; after the first seed with what that one found."""
    method = METHODS[name]
    if name == "npo":
        return name, None, method.start, method.choices
    goal = json.loads(place.found("npo").read_text())["best"]["probability"]
    if place == first:
        return name, goal, method.start, method.choices
    best = json.loads(first.found(name).read_text())["best"]
    return name, goal, best["dial"], (best["settings"],)


def spread(values: list[float]) -> str:
    """Give the mean and the half-width of its 95 % interval over seeds."""
    if len(values) < 2:
        return f"{mean(values):.4f}"
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.4f} ± {half:.4f}"


def report(args: argparse.Namespace) -> None:
    """Write the table, the plot and all numbers."""
    found = {
        name: [json.loads(place.read_text()) for seed in args.seeds
               if (place := args.out / f"seed-{seed}" / f"{name}.json").is_file()]
        for name in METHODS
    }  # fmt: skip
    found = {name: seeds for name, seeds in found.items() if seeds}
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    lines = ["| method | forget probability | KL, nats per token | model utility | seconds | MiB |",
             "|:--|--:|--:|--:|--:|--:|"]  # fmt: skip
    for name, seeds in found.items():
        best = [one["best"] for one in seeds]
        utility = [one["utility"] for one in seeds if "utility" in one]
        missed = sum(not one["matched"] for one in seeds)
        label = METHODS[name].label + (f" (not matched on {missed} seeds)" if missed else "")
        cells = [label, f"{mean(one['probability'] for one in best):.3f}",
                 spread([one["kl"] for one in best]), spread(utility) if utility else "",
                 f"{median(one['seconds'] for one in best):.0f}",
                 f"{median(one['peak_memory_bytes'] for one in best) / 2**20:.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + f"\n\n{max(map(len, found.values()))} seeds.\n"
    (args.out / "table.md").write_text(table)
    print(table)
    draw(args, found)


def draw(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Draw all that was tried, and beside it the runs at equal forgetting, seed by seed."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from unlearn.evals.report.plots import FAINT, INK, LINES, drawing, tidy, to_plot

    names = [name for name in METHODS if name in found]
    level = {name: mean(one["best"]["kl"] for one in found[name]) for name in names}
    names.sort(key=level.__getitem__, reverse=True)
    with drawing(max(3.2, 0.9 + 0.27 * len(names)), width=8.6) as figure:
        tried, equal = figure.subplots(1, 2, width_ratios=(1.1, 1.0))
        for place, name in enumerate(names):
            rival = METHODS[name].dial != "edit.forget_nll"
            colour = LINES[1] if rival else LINES[0]
            trials = [one for seed in found[name] for one in seed["trials"]]
            tried.scatter(*points(trials), s=14, color=colour, alpha=0.55, linewidths=0,
                          marker="s" if rival else "o")  # fmt: skip
            best = [seed["best"]["kl"] for seed in found[name]]
            equal.scatter(best, [place] * len(best), s=12, color=colour, alpha=0.5, linewidths=0)
            equal.scatter([level[name]], [place], s=46, color=colour, marker="|", linewidths=2)
        tried.set(xscale="log", yscale="log", xlabel="forget probability (lower: more forgotten)",
                  ylabel="KL on rows never seen, nats per token")  # fmt: skip
        equal.set(
            xscale="log", xlabel="KL at NPO's forget probability", ylim=(-0.6, len(names) - 0.4)
        )
        labels = [METHODS[name].label.replace("`", "") for name in names]
        equal.set_yticks(range(len(names)), labels, color=INK)
        equal.tick_params(axis="y", length=0)
        tried.set_title("all that was tried", loc="left", fontsize=10)
        equal.set_title("at equal forgetting", loc="left", fontsize=10)
        tried.set_xlim(left=5e-3)
        for axes in (tried, equal):
            tidy(axes)
            for axis in (axes.xaxis, axes.yaxis)[: 1 if axes is equal else 2]:
                axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        for marker, colour, label in (("s", LINES[1], "trained"), ("o", LINES[0], "steps")):
            tried.scatter([], [], s=18, color=colour, marker=marker, label=label)
        tried.legend(frameon=False, loc="lower left", fontsize=9, handletextpad=0.2)
        equal.axvline(level["npo"], color=FAINT, linewidth=0.8, linestyle=":")
        plot = to_plot(figure, "equal-forgetting", "Forgetting against the KL on rows never seen")
    (args.out / "plot.svg").write_text(plot.standalone())


def points(trials: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Give forget probability and KL of every trial."""
    return [one["probability"] for one in trials], [one["kl"] for one in trials]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--tofu", required=True, help="the folder of the TOFU data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")],
                        default=[0, 1, 2, 3, 4])  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2)
    others = [name for name in METHODS if name != "npo"]
    parser.add_argument("--only", nargs="+", choices=others, default=others)
    parser.add_argument("--utility", nargs="*", choices=list(METHODS), default=[])
    args = parser.parse_args()
    go(args)
    report(args)


if __name__ == "__main__":
    main()
