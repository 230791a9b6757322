"""Tokens per second with drafts against plain cached greedy decoding, on one core.

    python scripts/bench_mtp.py --width 512 --layers 4

Trains a Llama of that size on the toy language of ``mtp_table.py`` and a mask predictor beside it,
then continues prompts in both ways in turns, in one process, and gives medians of the ratios of
each pair. The plain way is a loop of its own, without hooks, over transformers' own cache. Every
text is compared.
"""

import argparse

import mtp_table
import torch

from unlearn.evals.mtp import measure_drafts, summary
from unlearn.mtp.decode import Drafting
from unlearn.mtp.settings import TrainSettings
from unlearn.mtp.train import train_predictor


def main() -> None:
    """Train, then time every layout and k."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--base-steps", type=int, default=80)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    model = mtp_table.toy_model(given.width, given.layers, given.base_steps)
    number = sum(one.numel() for one in model.parameters())
    how = TrainSettings(
        k=8, rank=16, labels="self", anchors=16, steps=given.steps, batch=4, lr=2e-3, held_out=0
    )
    rows = mtp_table.examples(mtp_table.toy_rows(200))
    predictor = train_predictor(model, rows, how).predictor
    prompts = [row[:13] for row in mtp_table.toy_rows(given.prompts, seed=9)]
    print(f"{number / 1e6:.1f}M parameters, width {given.width}, {given.layers} layers", flush=True)
    print("| layout | k | tokens/step | tokens/s | plain | ratio (median of pairs) | identical |")
    print("|:--|--:|--:|--:|--:|--:|--:|", flush=True)
    for layout in ("linear", "quadratic", "budget"):
        for k in (2, 4, 8):
            found = measure_drafts(
                predictor, mtp_table.Endless(), {"toy": prompts},
                max_new_tokens=given.tokens, drafting=Drafting(layout, k=k),
            )  # fmt: skip
            told = summary(found)["all"]
            cells = [layout, k, f"{told['tokens_per_step']:.2f}"]
            cells += [f"{told[n]:.0f}" for n in ("tokens_per_second", "plain_tokens_per_second")]
            cells += [f"{told['speedup']:.2f}", f"{told['identical']} of {told['prompts']}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
