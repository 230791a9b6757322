"""TRL's trainers on rows of ours: what losses and speed are compared with, and nothing else.

The only place that knows TRL's trainers and the names in their batches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

Row = Mapping[str, str]
"""A ``prompt`` with ``chosen`` and ``rejected``, or with a ``completion``."""
PLAIN: dict[str, Any] = {
    "bf16": False, "report_to": [], "max_length": None, "disable_tqdm": True,
    "save_strategy": "no", "gradient_checkpointing": False,
}  # fmt: skip
"""As ours: float32, nothing cut, nothing computed again."""


def dpo(
    model: Any, start: Any, rows: list[Row], tokenizer: Any, folder: Path, **settings: Any
) -> DPOTrainer:
    """Give DPO as TRL trains it, with the frozen start as a second model in memory."""
    config = DPOConfig(output_dir=str(folder), **_on_device(settings))
    return DPOTrainer(model, start, config, **_data(rows, tokenizer))


def simpo(
    model: Any, rows: list[Row], tokenizer: Any, folder: Path, *, gamma: float, **settings: Any
) -> CPOTrainer:
    """Give SimPO, which TRL has as a loss of its CPO trainer."""
    how = {"loss_type": "simpo", "simpo_gamma": gamma, "cpo_alpha": 0.0}
    config = CPOConfig(output_dir=str(folder), **how, **_on_device(settings))
    return CPOTrainer(model, config, **_data(rows, tokenizer))


def sft(model: Any, rows: list[Row], tokenizer: Any, folder: Path, **settings: Any) -> SFTTrainer:
    """Give plain training on completions."""
    config = SFTConfig(output_dir=str(folder), completion_only_loss=True, **_on_device(settings))
    return SFTTrainer(model, config, **_data(rows, tokenizer))


def loss_and_rows(trainer: Any) -> tuple[float, dict[str, dict[str, Tensor]]]:
    """Give the loss of all rows at once, and these rows as ours: by side, with labels."""
    rows = trainer.train_dataset
    inputs = dict(trainer.data_collator([rows[place] for place in range(len(rows))]))
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(inputs))
    return float(loss), _sides(inputs)


def _sides(inputs: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    ours = ("input_ids", "attention_mask", "labels")
    if "chosen_input_ids" in inputs:  # CPO: the two sides apart
        sides = ("chosen", "rejected")
        return {side: {name: inputs[f"{side}_{name}"] for name in ours} for side in sides}
    if "completion_mask" not in inputs:  # SFT
        return {"text": {name: inputs[name] for name in ours}}
    counts = inputs["completion_mask"].bool() & inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~counts, -100)  # DPO: chosen rows first
    whole = {"labels": labels} | {name: inputs[name] for name in ours[:2]}
    halves = {name: value.chunk(2) for name, value in whole.items()}
    return {
        side: {n: v[at] for n, v in halves.items()}
        for at, side in enumerate(("chosen", "rejected"))
    }


def _on_device(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**PLAIN, "use_cpu": not torch.cuda.is_available(), **settings}


def _data(rows: list[Row], tokenizer: Any) -> dict[str, Any]:
    dataset = Dataset.from_list([dict(row) for row in rows])
    return {"train_dataset": dataset, "processing_class": tokenizer}
