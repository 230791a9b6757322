"""Trainers on a few rows of a tiny model in float64; also a program: one of several processes.

As a program it says ``LOCAL_RANK`` 0 on every rank, as two nodes with one device each do: what is
this rank's must be found by its global rank.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from transformers import LlamaForCausalLM, TrainingArguments

from unlearn import reference
from unlearn.data.collate import Collator, StreamDataset
from unlearn.data.encode import Example
from unlearn.objectives import OBJECTIVES
from unlearn.posttrain.pruning import Pruner, Pruning
from unlearn.posttrain.reweighting import Weighting
from unlearn.scores import Scorer
from unlearn.terms import Term
from unlearn.training import UnlearningTrainer

ROWS = 13


def examples(seed: int) -> list[Example]:
    """Give rows of uneven length; their first three tokens are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(ROWS):
        length = int(torch.randint(5, 15, (1,), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        found.append(Example(ids, [-100] * 3 + ids[3:], 3, row))
    return found


STREAMS = {"chosen": examples(1), "rejected": examples(2), "text": examples(3)}


def term(objective: str, on: str, weight: float = 1.0, **more: Any) -> Term:
    return Term(OBJECTIVES[objective], on, weight, **more)


def weighted(scope: str, strategy: str = "linupper", objective: str = "nll", **how: Any) -> Any:
    settings = {"warmup": 0.0, "anneal": 0.0, "max_weight_ratio": 20.0} | how
    weighting = Weighting(strategy=strategy, scope=scope, **settings)  # type: ignore[arg-type]
    return (term(objective, "text", weighting=weighting),)


METHODS: dict[str, tuple[Term, ...]] = {
    "sft": (term("nll", "text"),),
    "redi": (term("answer_nll", "chosen"), term("answer_ascent", "rejected", 0.8)),
    "dpo": (term("preference", "chosen", rejected="rejected", hyper={"beta": 0.5}),),
    "simpo": (term("simpo", "chosen", rejected="rejected"),),
    "topr": (term("answer_nll", "chosen"), term("topr", "rejected")),
    **{scope: weighted(scope) for scope in ("micro", "step", "stream", "cached")},
    "sample": weighted("step", objective="answer_nll"),
}
ON_RANKS = ("redi", "dpo", "micro", "step", "stream", "cached")
APART = ("redi", "dpo", "step")


def make_trainer(
    model: Any,
    folder: Path,
    terms: Sequence[Term],
    pruner: Any = None,
    apart: bool = False,
    **changes: Any,
) -> Any:
    """Build a trainer on the streams that the terms read."""
    read = {stream for one in terms for stream in one.streams}
    asked = {s for one in terms if one.objective.uses_reference for s in one.streams}
    settings: Any = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_train_epochs": 2,
        "learning_rate": 1e-2, "remove_unused_columns": False, "report_to": [], "seed": 5,
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True,
        "dataloader_pin_memory": False, "warmup_steps": 0, "optim": "sgd", "max_grad_norm": 0.0,
    } | changes  # fmt: skip
    scorer = Scorer.for_model(model)
    return UnlearningTrainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=StreamDataset(
            STREAMS, seed=5, only=read, anchor="chosen" if "chosen" in read else "text"
        ),
        data_collator=Collator(
            0, {name: reference.score_rows(scorer, model, STREAMS[name]) for name in sorted(asked)}
        ),
        terms=terms,
        scorer=scorer,
        pruner=pruner,
        apart=apart,
    )


def trained(model: Any, folder: Path, terms: Sequence[Term], **changes: Any) -> dict[str, Tensor]:
    """Train and give the weights."""
    make_trainer(model, folder, terms, **changes).train()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def pruned(model: Any, folder: Path, rows: int) -> dict[str, Tensor]:
    """Train on four epochs of rows, the later ones without some, so many rows at once."""
    pruner = Pruner(Pruning("infobatch", 0.5, 0.5), ROWS, 4, seed=2)
    settings: Any = {"per_device_train_batch_size": rows, "num_train_epochs": 1}
    return trained(model, folder, METHODS["sft"], pruner=pruner, **settings)


def load(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(str(folder)).double()


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in weights.values()])


def main() -> None:
    """Take part as one rank of two."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    found = {
        name: flat(trained(load(folder), folder, METHODS[name], per_device_train_batch_size=4))
        for name in ON_RANKS
    }
    for name in APART:
        half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        weights = trained(load(folder), folder, METHODS[name], apart=True, **half)
        found[f"{name} apart"] = flat(weights)
    found["pruned"] = flat(pruned(load(folder), folder, 4))
    save_file(found, folder / f"rank-{rank}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
