r"""Time a step of REDI, and the memory it takes, against DPO as TRL's trainer does it.

    python scripts/bench_posttrain.py --width 512 --layers 6 --threads 1 --memory
    python scripts/bench_posttrain.py --dtype bfloat16 --width 2048 --layers 16 --longest 4096 \
        --vocabulary 128000 --memory

The code that came with REDI is a loss within TRL's DPOTrainer. So that trainer, with its defaults,
is what we are compared with: both answers of a pair padded to one rectangle, and the frozen start
loaded, which REDI does not need. Both sides train the same random Llama on the same pairs, AdamW,
float32 or bfloat16, as many pairs in a forward pass (``--batch``) and in a step (``--batch`` times
``--accumulation``). Pairs are random words; the length of each answer is drawn between
``--shortest`` and ``--longest`` tokens, evenly in the logarithm, so some are ten times others, as
traces of reasoning are. Every step has the same pairs: the ratio of times is that of tokens per
second, which counts real tokens only.

``--methods``: ``redi`` (the two sides go one after the other, ``training.passes: apart``) and
``dpo`` (our own: the start's log-probabilities are computed once; ``dpo-apart`` in two passes).
For ``dpo`` the losses of the first steps must agree with TRL's.

Each side runs in a process of its own. They take steps in turn, one waiting for the other; ratios
are medians over these pairs. Both do whole steps of ``train()``: fetching and padding rows, going
there and back, clipping, the optimiser. ``--memory``: the peak beyond that of the process before it
has a model: resident size on a CPU, in runs of their own whose allocator gives freed blocks back at
once; on CUDA what the allocator held at most in the last step that was timed.

What bounds it, in units of one forward pass over the real tokens: theirs is 4 (the start 1, there
and back 3) times what padding adds, ours 3; the gain is 4/3 of the padding, which is the longer
row of each pair, or the longest of a batch, over the mean. Memory: weights, gradients and two
moments are 4 copies of the model, theirs 5; beside these stand the activations, of one side of a
batch here, of both and of the padding there. A model that is large beside its batch comes near
4/5, long answers near 1/2 and less.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from on_device import begin_peak, now, peak
from random_llama import random_llama
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from turns import EXACT, in_turn, resident, said, tell, worker

from unlearn import reference
from unlearn.data import Template, encode
from unlearn.data.collate import Collator, StreamDataset
from unlearn.data.pairs import SIDES as ANSWERS
from unlearn.data.pairs import sides_of
from unlearn.objectives import OBJECTIVES
from unlearn.packing import can_pack, packable
from unlearn.scores import Scorer
from unlearn.terms import Term
from unlearn.training import UnlearningTrainer

METHODS = ("redi", "dpo", "dpo-apart")
SIDES = ("trl", "ours")
BETA = 0.1
PROMPT = 24
"""Tokens of every prompt."""
AGREEMENT = 1e-3
"""Largest relative difference of DPO's losses, in float32."""


def main() -> None:
    """Run both sides of every method in turn and print one JSON object."""
    arguments = sys.argv[1:]
    options = _parser().parse_args(arguments)
    if options.worker:
        _work(options, *options.worker)
        return
    found = {"pairs": _told(pairs(options))}
    for method in options.methods:
        found[method] = _race(method, options, arguments)
        if options.memory and not torch.cuda.is_available():
            found[method] |= _memory(method, arguments)
        print(f"{method}: {found[method]['speedup']} times as fast", file=sys.stderr)
    print(json.dumps(found, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["redi", "dpo"])
    numbers = {
        "width": 512, "layers": 6, "vocabulary": 8192, "batch": 4, "accumulation": 2, "steps": 6,
        "shortest": 48, "longest": 480, "threads": 1,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "SIDE"), help=argparse.SUPPRESS)
    return parser


def pairs(options: argparse.Namespace) -> list[dict[str, str]]:
    """Draw the pairs of one step."""
    dice = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{dice.randrange(options.vocabulary - 4)}" for _ in range(number))

    def length() -> int:
        low, high = math.log(options.shortest), math.log(options.longest)
        return round(math.exp(dice.uniform(low, high))) - PROMPT - 1

    return [
        {"prompt": words(PROMPT)} | {side: f" {words(length())}" for side in ANSWERS}
        for _ in range(options.batch * options.accumulation)
    ]


def tokenizer(vocabulary: int) -> Any:
    """Give a tokenizer with one token per word of the pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{place}" for place in range(vocabulary - 4))]
    words = models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>")
    core = Tokenizer(words)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def _told(rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    lengths = [PROMPT + len(row[side].split()) + 1 for row in rows for side in ANSWERS]
    return {"rows": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}


def _race(method: str, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    with (
        worker(__file__, arguments, method, "trl") as one,
        worker(__file__, arguments, method, "ours") as other,
    ):
        steps = in_turn({"trl": one, "ours": other}, options.steps + 1)[1:]  # the first warms up
    if method != "redi" and options.dtype == "float32":
        _check_losses(steps)
    ratios = [step["trl"]["seconds"] / step["ours"]["seconds"] for step in steps]
    tokens = _told(pairs(options))["tokens"]
    seconds = {side: statistics.median(step[side]["seconds"] for step in steps) for side in SIDES}
    found = _peaks(steps[-1]) if torch.cuda.is_available() else {}
    return found | {
        "speedup": round(statistics.median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "tokens_per_second": {side: round(tokens / spent) for side, spent in seconds.items()},
    }


def _check_losses(steps: Sequence[dict[str, Any]]) -> None:
    for step in steps:
        theirs, ours = step["trl"]["loss"], step["ours"]["loss"]
        if abs(theirs - ours) > AGREEMENT * abs(theirs):
            sys.exit(f"the losses differ: {theirs} and {ours}")


def _memory(method: str, arguments: Sequence[str]) -> dict[str, Any]:
    step = {}
    for side in SIDES:
        with worker(__file__, arguments, method, side, **EXACT) as process:
            said(process)
            step[side] = [said(process, "go") for _ in range(2)][-1]
    return _peaks(step)


def _peaks(step: dict[str, Any]) -> dict[str, Any]:
    peaks = {side: step[side]["peak"] for side in SIDES}
    return {
        "memory_ratio": round(peaks["ours"] / peaks["trl"], 3),
        "peak_mebibytes": {side: round(peak / 2**20) for side, peak in peaks.items()},
    }


class _InTurn(TrainerCallback):
    """Takes a step when told to, and says how long it took, its loss, and the peak of memory."""

    def __init__(self, before: int) -> None:
        self.before, self.loss, self.begun = before, 0.0, 0.0

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        tell({"loaded": True})
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        seconds = now() - self.begun
        tell({"seconds": seconds, "loss": self.loss, "peak": self._peak()})
        self._begin()

    def _begin(self) -> None:
        begin_peak()
        self.begun = now()

    def _peak(self) -> int:
        return peak() - (0 if torch.cuda.is_available() else self.before)


def _work(options: argparse.Namespace, method: str, side: str) -> None:
    """Be one side: train, a step at a time."""
    torch.set_num_threads(options.threads)
    before = resident()
    positions = options.longest + PROMPT
    model = random_llama(options.width, options.layers, options.vocabulary, positions=positions)
    model.to(getattr(torch, options.dtype)).config.pad_token_id = 0
    steps = {
        "max_steps": options.steps + 2, "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation, "learning_rate": 1e-5,
        "activation_checkpointing": options.checkpointing, "logging_strategy": "no",
        "warmup_steps": 0, "disable_tqdm": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        build = _theirs if side == "trl" else _ours
        trainer = build(model, options, method, Path(folder), steps)
        turn = _InTurn(before)
        trainer.add_callback(turn)
        _keep_loss(trainer, turn)
        if side == "ours" and can_pack(trainer.model):
            with packable(trainer.model):
                trainer.train()
        else:
            trainer.train()


def _keep_loss(trainer: Any, turn: _InTurn) -> None:
    """Add up the loss of a step's passes."""
    step, begin = trainer.training_step, turn._begin

    def kept(*given: Any, **more: Any) -> Any:
        loss = step(*given, **more)
        turn.loss += float(loss)
        return loss

    def begun() -> None:
        turn.loss = 0.0
        begin()

    trainer.training_step, turn._begin = kept, begun


def _theirs(
    model: Any, options: argparse.Namespace, method: str, folder: Path, steps: dict[str, Any]
) -> Any:
    import copy

    import trl_way

    words = tokenizer(options.vocabulary)
    start = copy.deepcopy(model)
    return trl_way.dpo(model, start, pairs(options), words, folder, beta=BETA, **steps)


def _ours(
    model: Any, options: argparse.Namespace, method: str, folder: Path, steps: dict[str, Any]
) -> UnlearningTrainer:
    words, rows = tokenizer(options.vocabulary), sides_of(pairs(options), "pairs")
    template = Template.for_tokenizer(words, None, None, {})
    streams = {
        side: encode(part, words, template, max_length=options.longest + PROMPT, source=side)
        for side, part in rows.items()
    }
    scorer = Scorer.for_model(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    stored = {}
    if method != "redi":
        stored = {side: reference.score_rows(scorer, model, part) for side, part in streams.items()}
    return UnlearningTrainer(
        model=model,
        args=TrainingArguments(
            str(folder), remove_unused_columns=False, report_to=[], save_strategy="no",
            use_cpu=not torch.cuda.is_available(), **steps,
        ),
        train_dataset=StreamDataset(streams, seed=0, anchor="chosen"),
        data_collator=Collator(0, stored),
        terms=_terms(method),
        scorer=scorer,
        apart=method != "dpo",
    )  # fmt: skip


def _terms(method: str) -> tuple[Term, ...]:
    if method == "redi":
        return (
            Term(OBJECTIVES["answer_nll"], "chosen"),
            Term(OBJECTIVES["answer_ascent"], "rejected", 0.8),
        )
    return (Term(OBJECTIVES["preference"], "chosen", hyper={"beta": BETA}, rejected="rejected"),)


if __name__ == "__main__":
    main()
