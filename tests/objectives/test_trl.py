"""The losses of post-training are those of TRL on the same rows, to float32 rounding."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.objectives import batch_loss
from unlearn.scores import Scorer, label_mask

SCRIPTS = str(Path(__file__).parents[2] / "scripts")
PAIRS = [
    {"prompt": "Where was Ada?", "chosen": " Oslo.", "rejected": " In a small boat."},
    {"prompt": "What does Bo paint?", "chosen": " Boats in the morning.", "rejected": " A fox."},
]
ROWS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
EXACT = 1e-5


@pytest.fixture
def trl_way(monkeypatch: Any) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    pytest.importorskip("trl")
    import trl_way

    yield trl_way
    sys.modules.pop("trl_way")


@pytest.fixture
def tokenizer(build_tiny_tokenizer: Any) -> Any:
    return build_tiny_tokenizer(chat=False)


def said(model: Any, batches: Any) -> Any:
    scorer = Scorer.for_model(model)
    return {side: scorer(model, batch) for side, batch in batches.items()}


@pytest.mark.parametrize(("length_norm", "loss_type"), [(False, "sigmoid"), (True, "sigmoid_norm")])
def test_dpo(
    length_norm: bool, loss_type: str, trl_way: Any, tokenizer: Any, build_tiny_model: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    model, start = build_tiny_model(), build_tiny_model(seed=3)
    how = {"loss_type": [loss_type], "beta": 0.2}
    theirs, batches = trl_way.loss_and_rows(
        trl_way.dpo(model, start, PAIRS, tokenizer, tmp_path, **how)
    )
    ours, frozen = said(model, batches), said(start, batches)
    found = batch_loss(
        "preference", ours["chosen"], frozen["chosen"], rejected=ours["rejected"],
        rejected_reference=frozen["rejected"], beta=0.2, length_norm=length_norm,
    )  # fmt: skip
    assert theirs == pytest.approx(float(found.detach()), abs=EXACT)
    assert theirs != pytest.approx(math.log(2), abs=1e-4)  # that of no difference at all


def test_simpo(trl_way: Any, tokenizer: Any, tiny_model: Any, tmp_path: Path) -> None:
    """TRL divides gamma by beta before it multiplies the margin by beta: ours is 0.9."""
    trainer = trl_way.simpo(tiny_model, PAIRS, tokenizer, tmp_path, gamma=0.9, beta=3.0)
    theirs, batches = trl_way.loss_and_rows(trainer)
    ours = said(tiny_model, batches)
    found = batch_loss("simpo", ours["chosen"], rejected=ours["rejected"], beta=3.0, gamma=0.9)
    assert theirs == pytest.approx(float(found.detach()), abs=EXACT)
    without = batch_loss("simpo", ours["chosen"], rejected=ours["rejected"], beta=3.0, gamma=0.0)
    assert abs(theirs - float(without.detach())) > 0.1


def test_sft(trl_way: Any, tokenizer: Any, tiny_model: Any, tmp_path: Path) -> None:
    """All tokens of completions count alike, end token included."""
    theirs, batches = trl_way.loss_and_rows(trl_way.sft(tiny_model, ROWS, tokenizer, tmp_path))
    ours = said(tiny_model, batches)["text"]
    assert theirs == pytest.approx(float(batch_loss("nll", ours).detach()), abs=EXACT)
    labels = batches["text"]["labels"]
    assert int(label_mask(labels).sum()) == sum(
        len(tokenizer(row["completion"])["input_ids"]) + 1 for row in ROWS
    )
    assert (labels == torch.tensor(tokenizer.eos_token_id)).sum() == len(ROWS)
