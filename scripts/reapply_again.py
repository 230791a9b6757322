r"""Unlearn, train further until part of it is back, then add the update again, or run afresh.

    python scripts/reapply_again.py --target ../shared/models/tofu-tiny-target \
        --tofu ../shared/data/tofu --out runs/again [--seeds 0,1,2] [--leaked 20] [--epochs 3]

Per seed: K-FADE (preset ``tofu-tiny/kfade``) takes TOFU's ``forget05`` out of the target. The model
is then trained further on 300 rows about other authors, 100 of the rows it was to keep, and
``--leaked`` of the 200 forgotten ones, which brings back more than those (the probability is told
over all 200). On that model are tried: the update at scales 0.25, 0.5 and 1, the scale searched
(``unlearn.edits.reapply``) for the forget loss that the first run ended with, and K-FADE afresh
with that goal. Seconds are those of the edit alone, one thread. KL(tuned || model) is on 80 rows
that no run has seen, in nats per labelled token. Writes ``results.json`` and ``table.md``.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import mean
from typing import Any

FORGET, KEPT, OTHERS = "forget05", 400, 300
DRAWN, AGAIN = 80, 100


def write(path: Path, rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def rows_of(tofu: str, folder: Path, seed: int, leaked: int) -> dict[str, str]:
    """Write the rows of one seed: to keep, never seen, and for training further."""
    from unlearn.data.sources import load_rows

    draw = random.Random(seed)
    kept = load_rows(f"{tofu}#full:train[:{KEPT}]")
    drawn = set(draw.sample(range(KEPT), DRAWN))
    rest = [row for at, row in enumerate(kept) if at not in drawn]
    forget = load_rows(f"{tofu}#{FORGET}")
    others = load_rows(f"{tofu}#full:train[{KEPT}:{KEPT + OTHERS}]")
    further = [*others, *draw.sample(rest, AGAIN), *draw.sample(forget, leaked)]
    return {
        "forget": write(folder / "forget.jsonl", forget),
        "retain": write(folder / "retain.jsonl", rest),
        "drawn": write(folder / "drawn.jsonl", [kept[at] for at in sorted(drawn)]),
        "further": write(folder / "further.jsonl", further),
    }


TUNING = """method: further
description: Plain training on the rows named as the forget set.
terms: [{objective: nll, on: forget}]
training: {per_device_train_batch_size: 8, gradient_accumulation_steps: 1, learning_rate: 3.0e-4}
evals: {generate: false}
"""


def run(recipe: str, model: str, rows: dict[str, str], out: Path, *settings: str) -> dict[str, Any]:
    """Run a recipe, or read what it gave before."""
    from unlearn.recipes.files import load
    from unlearn.recipes.run import run as run_recipe

    if (out / "results.json").is_file():
        return dict(json.loads((out / "results.json").read_text()))
    flags = {"model": {"path": model}, "out": str(out),
             "data": {"forget": rows["forget"], "retain": rows["retain"]}}  # fmt: skip
    return run_recipe(load(recipe, ["evals.generate=false", *settings], flags))


def seed_of(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Give one line per model: what is left, how far it is from the tuned one, seconds."""
    folder = args.out / f"seed-{seed}"
    rows = rows_of(args.tofu, folder, seed, args.leaked)
    recipe = folder / "further.yaml"
    recipe.write_text(TUNING)
    goal = "edit.retain_kl=null"
    first = run("tofu-tiny/kfade", args.target, rows, folder / "first", goal, f"seed={seed}")
    reached = first["training"]["curve"][-1]["forget/nll"]
    run(str(recipe), first["model"], rows | {"forget": rows["further"]}, folder / "tuned",
        f"seed={seed}", f"training.num_train_epochs={args.epochs}")  # fmt: skip
    tuned = str(folder / "tuned" / "model")
    update = f"edit.update={folder / 'first' / 'update.safetensors'}"
    level = (f"edit.forget_nll={reached}", goal)
    lines = [
        line("target", rows, tuned, args.target),
        line("unlearned", rows, tuned, first["model"], first),
        line("trained further", rows, tuned, tuned),
    ]
    for scale in (0.25, 0.5, 1.0):
        found = run("tofu-tiny/reapply", tuned, rows, folder / f"scale-{scale}", update, *level,
                    f"edit.scale={scale}")  # fmt: skip
        lines.append(line(f"update x {scale:g}", rows, tuned, found["model"], found))
    found = run("tofu-tiny/reapply", tuned, rows, folder / "searched", update, *level)
    scale = found["training"]["curve"][-1]["alpha"]
    lines.append(line("update, scale searched", rows, tuned, found["model"], found) |
                 {"scale": scale})  # fmt: skip
    found = run("tofu-tiny/kfade", tuned, rows, folder / "afresh", *level, f"seed={seed}")
    lines.append(line("K-FADE afresh", rows, tuned, found["model"], found))
    return lines


def line(
    name: str, rows: dict[str, str], tuned: str, model: str, results: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Measure a model: probability of forget and retain answers, KL(tuned || model)."""
    from unlearn.data import Template, encode, load_rows
    from unlearn.evals.retain_kl import mean_kl
    from unlearn.models import ModelSource, load_model, load_tokenizer
    from unlearn.scoring import scored

    tokenizer, loaded = load_tokenizer(ModelSource(tuned)), load_model(ModelSource(model))
    template = Template.for_tokenizer(tokenizer)

    def examples(name: str) -> Any:
        read = load_rows(rows[name])
        return encode(read, tokenizer, template, max_length=512, source=name)

    def probability(name: str) -> float:
        found = [float(p) for _, scores in scored(loaded, examples(name))
                 for p in (scores.log_probs.sum(1) / scores.mask.sum(1)).exp()]  # fmt: skip
        return mean(found)

    start = load_model(ModelSource(tuned))
    return {
        "model": name,
        "forget": probability("forget"),
        "retain": probability("drawn"),
        "kl": mean_kl(start, loaded, examples("drawn"))[0],
        "seconds": results["training"]["seconds"] if results else None,
    }


def table(found: list[list[dict[str, Any]]]) -> str:
    lines = ["| model | forget probability | probability, rows never seen | KL from the tuned one "
             "| seconds |", "|:--|--:|--:|--:|--:|"]  # fmt: skip
    for group in zip(*found, strict=True):
        cells = [f"{mean(one[key] for one in group):.3f}" for key in ("forget", "retain", "kl")]
        seconds = [one["seconds"] for one in group if one["seconds"] is not None]
        scales = [one["scale"] for one in group if "scale" in one]
        name = group[0]["model"]
        if scales:
            name += f" ({', '.join(f'{one:.2g}' for one in scales)})"
        lines.append(f"| {name} | {' | '.join(cells)} | "
                     f"{f'{mean(seconds):.0f}' if seconds else ''} |")  # fmt: skip
    over = f"Means over {len(found)} seeds." if len(found) > 1 else "One seed."
    return "\n".join(lines) + f"\n\n{over}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--tofu", required=True, help="the folder of the TOFU data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")],
                        default=[0, 1, 2])  # fmt: skip
    parser.add_argument("--leaked", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    found = [seed_of(args, seed) for seed in args.seeds]
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    (args.out / "table.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
