r"""Clamping features of a sparse autoencoder beside its controls and RMU, at equal side effects.

    python scripts/sae_table.py --target ../shared/models/tofu-tiny-target \
        --tofu ../shared/data/tofu --out runs/sae-table [--seeds 0,1,2,3,4] [--kl 0.2] \
        [--forget world_facts]

Per seed: a dictionary of what leaves layer 1 is trained on rows that the target has memorised:
those of ``--forget`` (``world_facts``: questions about the world; ``forget10``: more made-up
authors, in the very words of those to keep), repeated until they are as many, and 400 rows to keep,
about made-up authors. The preset ``tofu-tiny/sae`` is run with it, its settings those below, its
budget ``--kl`` nats per token of KL(target || clamped) on 64
retain rows that features are not chosen by. Its controls use the same features: set to 0, and other
directions changed as much. RMU (preset ``tofu-tiny/rmu``) is run with several strengths, and the
one that forgets most within the same KL on the same rows is taken. Losses are means over labelled
tokens, in nats, on up to 256 forget rows and those 64. Writes ``results.json`` and ``table.md``; a
stopped run goes on.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

LAYER, KEPT = 1, 400
DICTIONARY = {
    "kind": "batchtopk", "features": 1024, "k": 16, "steps": 1500, "batch": 512, "buffer": 16384,
    "context": 256, "pack": False, "lr": 2e-3,
}  # fmt: skip
SETTINGS = ("edit.features=[10,20,40]", "edit.c=[1x,1.5x,2x]", "edit.tau=0.01")
STEERING = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Lengths of RMU's vector; how strongly it pushes."""
NAMES = {
    "start": "target",
    "clamp": "clamped",
    "zero": "the same features set to 0",
    "random": "other directions, changed as much",
    "rmu": "RMU within the same KL",
}


def write(path: Path, rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def rows_of(args: argparse.Namespace) -> dict[str, str]:
    """Write the rows to forget, those to keep, and both."""
    from unlearn.data.sources import load_rows

    forget = load_rows(f"{args.tofu}#{args.forget}")
    retain = load_rows(f"{args.tofu}#full:train[:{KEPT}]")
    often = max(1, round(len(retain) / len(forget)))
    named = {"forget": forget, "retain": retain, "both": [*retain, *forget * often]}
    return {name: write(args.out / f"{name}.jsonl", rows) for name, rows in named.items()}


def dictionary(args: argparse.Namespace, rows: dict[str, str], out: Path, seed: int) -> str:
    """Train a dictionary, or go on training it."""
    from unlearn.models import ModelSource
    from unlearn.recipes.sae import Texts, settings_of, train

    if not (out / "results.json").is_file():
        texts = Texts(ModelSource(args.target), rows["both"])
        train(texts, settings_of({**DICTIONARY, "layer": LAYER, "seed": seed}, []), out)
    return str(out)


def run(recipe: str, model: str, rows: dict[str, str], out: Path, *settings: str) -> dict[str, Any]:
    """Run a recipe, or read what it gave before."""
    from unlearn.recipes.files import load
    from unlearn.recipes.run import run as run_recipe

    if (out / "results.json").is_file():
        return dict(json.loads((out / "results.json").read_text()))
    flags = {"model": {"path": model}, "out": str(out),
             "data": {"forget": rows["forget"], "retain": rows["retain"]}}  # fmt: skip
    small = ("evals.generate=false", "evals.max_rows=40")
    return run_recipe(load(recipe, [*small, *settings], flags))


def rmu(args: argparse.Namespace, rows: dict[str, str], folder: Path, seed: int) -> dict[str, Any]:
    """Give the losses of the RMU that forgets most within the KL."""
    found = []
    for steering in STEERING:
        how = (f"terms.forget.steering={steering}", f"seed={seed}")
        done = run("tofu-tiny/rmu", args.target, rows, folder / f"rmu-{steering:g}", *how)
        found.append(measured(args.target, done["model"], rows) | {"steering": steering})
    within = [one for one in found if one["retain/kl"] <= args.kl]
    nearest = min(found, key=lambda one: one["retain/kl"])
    return max(within, key=lambda one: one["forget/nll"]) if within else nearest


def measured(start: str, model: str, rows: dict[str, str]) -> dict[str, Any]:
    """Measure a model on the rows that clamps are measured on."""
    from unlearn.curvature.distance import mean_nll
    from unlearn.curvature.parts import Parts
    from unlearn.data import Template, encode, load_rows
    from unlearn.evals.retain_kl import mean_kl
    from unlearn.models import ModelSource, load_model, load_tokenizer
    from unlearn.scores import Scorer

    tokenizer = load_tokenizer(ModelSource(start))
    template = Template.for_tokenizer(tokenizer)
    data = {name: encode(load_rows(rows[name]), tokenizer, template, max_length=512, source=name)
            for name in ("forget", "retain")}  # fmt: skip
    parts = Parts.of(data, 64, None, 256, 8192)
    before, now = (load_model(ModelSource(path)) for path in (start, model))
    scorer = Scorer.for_model(now)
    return {
        "forget/nll": mean_nll(now, parts.measured, scorer),
        "retain/nll": mean_nll(now, parts.held_out, scorer),
        "retain/kl": mean_kl(before, now, parts.held_out.examples)[0],
    }


def seed_of(args: argparse.Namespace, rows: dict[str, str], seed: int) -> dict[str, Any]:
    """Give the losses of one seed by what was done."""
    folder = args.out / f"seed-{seed}"
    place = dictionary(args, rows, folder / "dictionary", seed)
    how = (f"edit.dictionary={place}", f"edit.retain_kl={args.kl}", f"seed={seed}", *SETTINGS)
    clamp = run("tofu-tiny/sae", args.target, rows, folder / "clamped", *how)["training"]["clamp"]
    found = {"start": clamp["start"], "clamp": clamp}
    found |= {one["mode"]: one for one in clamp["controls"]}
    return found | {"rmu": rmu(args, rows, folder, seed)}


def table(found: list[dict[str, Any]]) -> str:
    """Set out changes against the target: mean and standard deviation over seeds."""
    lines = ["| | forget loss | retain loss | retain KL |", "|:--|--:|--:|--:|"]
    for name, title in NAMES.items():
        cells = [
            spread([one[name][key] - one["start"][key] for one in found])
            if name != "start"
            else spread([one["start"][key] for one in found])
            for key in ("forget/nll", "retain/nll", "retain/kl")
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    taken = "; ".join(
        f"{one['clamp']['features']} features, c {one['clamp']['c']}, tau {one['clamp']['tau']:g}, "
        f"RMU {one['rmu']['steering']:g}" for one in found
    )  # fmt: skip
    over = f"{len(found)} seeds" if len(found) > 1 else "one seed"
    return "\n".join(lines) + f"\n\nChanges in nats per token, {over}. Taken: {taken}.\n"


def spread(values: list[float]) -> str:
    more = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--tofu", required=True, help="the folder of the TOFU data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")],
                        default=[0, 1, 2, 3, 4])  # fmt: skip
    parser.add_argument("--forget", default="world_facts", help="part of TOFU to forget")
    parser.add_argument("--kl", type=float, default=0.2)
    args = parser.parse_args()
    rows = rows_of(args)
    found = [seed_of(args, rows, seed) for seed in args.seeds]
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    (args.out / "table.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
