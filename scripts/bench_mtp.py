"""Tokens per second with drafts against plain cached greedy decoding, on one core or one GPU.

    python scripts/bench_mtp.py --width 512 --layers 4
    python scripts/bench_mtp.py --device cuda --dtype bfloat16 --width 2048 --layers 16 \
        --vocab 128256

Trains a Llama of that size on the toy language of ``mtp_table.py`` and a mask predictor beside it,
then continues prompts one at a time in both ways in turns, in one process, and gives medians of
the ratios of each pair. The plain way is a loop of its own, without hooks, over transformers' own
cache. A GPU is waited for before and after every text. Every text is compared: where two part, it
must be at a tie up to rounding, or the program fails; those that do not are counted.
"""

import argparse
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import mtp_table
import torch
import transformers

from unlearn.errors import RunFailed
from unlearn.evals.mtp import measure_drafts, summary
from unlearn.mtp.decode import Drafting, decode
from unlearn.mtp.layouts import LAYOUTS
from unlearn.mtp.settings import TrainSettings
from unlearn.mtp.train import train_predictor

HEADER = (
    "layout", "k", "tokens/step", "tokens/s", "plain", "ms/step", "plain ms", "a step, in plain",
    "speed-up", "identical",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=mtp_table.VOCABULARY)
    parser.add_argument("--base-steps", type=int, default=80)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, help="Of the predictor; 2e-3 up to a width of 512.")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--k", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--out", type=Path, help="Write the figures as JSON.")
    return parser.parse_args()


def machine(device: str) -> str:
    """Name what is timed, and with what."""
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return f"{where}, torch {torch.__version__}, transformers {transformers.__version__}"


def prepared(given: argparse.Namespace) -> Any:
    """Train base and predictor; give the predictor in the precision of the base."""
    dtype = getattr(torch, given.dtype)
    model = mtp_table.toy_model(
        given.width, given.layers, given.base_steps, vocabulary=given.vocab, device=given.device,
        dtype=dtype,
    )  # fmt: skip
    number = sum(one.numel() for one in model.parameters())
    rate = given.lr or 2e-3 * min(1.0, (512 / given.width) ** 0.5)
    how = TrainSettings(
        k=8, rank=given.rank, labels="self", anchors=16, steps=given.steps, batch=4, lr=rate,
        held_out=20,
    )  # fmt: skip
    rows = mtp_table.examples(mtp_table.toy_rows(200))
    trained = train_predictor(model, rows, how)
    right = trained.metrics["right"]
    print(f"predictor: {right:.1%} of the drafts right after {given.steps} steps", flush=True)
    size = f"width {given.width}, {given.layers} layers, vocabulary {given.vocab}, {given.dtype}"
    print(f"{number / 1e6:.1f}M parameters, {size}\n{machine(given.device)}", flush=True)
    return trained.predictor.to(dtype)


def figures(predictor: Any, prompts: Any, tokens: int, drafting: Drafting) -> dict[str, Any]:
    """Time one layout and k; milliseconds are means over all steps."""
    found = measure_drafts(
        predictor, mtp_table.Endless(), {"toy": prompts}, max_new_tokens=tokens, drafting=drafting
    )
    told: dict[str, Any] = summary(found)["all"]
    step = 1e3 * told["tokens_per_step"] / told["tokens_per_second"]
    plain = 1e3 / told["plain_tokens_per_second"]
    return told | {"ms_per_step": step, "plain_ms": plain}


def line(layout: str, k: int, told: dict[str, Any]) -> str:
    cells = [layout, str(k), f"{told['tokens_per_step']:.2f}"]
    cells += [f"{told[name]:.0f}" for name in ("tokens_per_second", "plain_tokens_per_second")]
    cells += [f"{told[name]:.2f}" for name in ("ms_per_step", "plain_ms")]
    cells += [f"{told['ms_per_step'] / told['plain_ms']:.2f}", f"{told['speedup']:.2f}"]
    cells.append(f"{told['identical']} of {told['prompts']}")
    return f"| {' | '.join(cells)} |"


def waits(predictor: Any, prompt: list[int], tokens: int) -> str:
    """Count how often a step with drafts waits for the GPU: once is what it takes."""
    drafting = Drafting("quadratic")
    decode(predictor, prompt, max_new_tokens=tokens, drafting=drafting)  # fills what is kept
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        written = decode(predictor, prompt, max_new_tokens=tokens, drafting=drafting)
        torch.cuda.set_sync_debug_mode("default")
    number = sum("synchroniz" in str(one.message) for one in told)
    return f"{number} waits for the device in {written.steps} steps"


def main() -> None:
    """Train, then time every layout and k."""
    given = arguments()
    predictor = prepared(given)
    prompts = [row[:13] for row in mtp_table.toy_rows(given.prompts, seed=9)]
    if given.device == "cuda":
        print(waits(predictor, prompts[0], given.tokens), flush=True)
    print(f"| {' | '.join(HEADER)} |\n|:--{'|--:' * (len(HEADER) - 1)}|", flush=True)
    found, wrong = {}, 0
    for layout in given.layouts:
        for k in given.k:
            try:
                told = figures(predictor, prompts, given.tokens, Drafting(layout, k=k))
            except RunFailed as failure:  # the other rows are still worth their time
                print(f"| {layout} | {k} | {failure}", flush=True)
                wrong += 1
                continue
            found[f"{layout} {k}"] = told
            print(line(layout, k, told), flush=True)
    if given.out:
        about = {key: str(value) for key, value in vars(given).items()}
        about["machine"] = machine(given.device)
        given.out.write_text(json.dumps({"about": about, "found": found}, indent=1))
    if wrong:
        raise SystemExit(f"{wrong} of the rows hold a text that is not that of plain decoding")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
