"""Streams that go through the model one after another: the same steps, one stream at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.posttrain.test_trainer import EXACT, assert_moved, assert_same
from tests.posttrain.trainers import METHODS, make_trainer, term, trained
from unlearn.packing import packable

WITH_NLL = (*METHODS["dpo"], term("answer_nll", "chosen", 0.5))
"""A loss of two streams beside one of a stream alone (RPO)."""


@pytest.fixture
def make(build_tiny_model: Any) -> Any:
    return lambda **config: build_tiny_model(**config).double()


def watched(trainer: Any) -> list[tuple[bool, dict[str, torch.Tensor]]]:
    """Keep what the model says in each of its passes, and whether the pass has a gradient."""
    found: list[tuple[bool, dict[str, torch.Tensor]]] = []
    ask = trainer._policy

    def policy(model: Any, inputs: Any) -> Any:
        said = ask(model, inputs)
        kept = {stream: one.log_probs.detach() for (stream, _), one in said.items()}
        found.append((torch.is_grad_enabled(), kept))
        return said

    trainer._policy = policy
    return found


@pytest.mark.parametrize("method", ["redi", "dpo", "simpo", "topr", "step", "with nll"])
def test_apart_takes_the_steps_of_together(method: str, make: Any, tmp_path: Path) -> None:
    """Over two epochs of 13 rows, 6 a step: also with accumulation and a last step of one row."""
    terms = METHODS.get(method, WITH_NLL)
    steps = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    together = trained(make(), tmp_path, terms, **steps)
    assert_same(trained(make(), tmp_path, terms, apart=True, **steps), together)
    assert_moved(together, make().state_dict())


def test_apart_without_padding(make: Any, tmp_path: Path) -> None:
    model = make()
    with packable(model):
        packed = trained(model, tmp_path, METHODS["dpo"], apart=True)
    assert_same(packed, trained(make(), tmp_path, METHODS["dpo"]))


@pytest.mark.parametrize("method", ["redi", "dpo", "step"])
def test_the_same_is_told(method: str, make: Any, tmp_path: Path) -> None:
    """Losses of terms and streams, entropy, margin and weights of rows: all over the whole step."""
    told = []
    for apart in (False, True):
        trainer = make_trainer(make(), tmp_path, METHODS[method], apart=apart, max_steps=1)
        result = trainer.train()
        told.append(trainer.summary() | {"loss": result.training_loss})
    assert told[1] == pytest.approx(told[0], abs=EXACT)
    assert len(told[0]) > 3


@pytest.mark.parametrize(("method", "without_gradient"), [("redi", 0), ("simpo", 2)])
def test_one_stream_at_a_time(
    method: str, without_gradient: int, make: Any, tmp_path: Path
) -> None:
    """One pass per side; two more, without gradient, where the loss is of both."""
    trainer = make_trainer(make(), tmp_path, METHODS[method], apart=True, max_steps=1)
    passes = watched(trainer)
    trainer.train()
    assert [list(said) for graded, said in passes if graded] == [["chosen"], ["rejected"]]
    assert sum(not graded for graded, _ in passes) == without_gradient


def test_dropout_falls_alike_in_both_passes(make: Any, tmp_path: Path) -> None:
    """Slopes belong to the log-probabilities that go back; the next step draws anew."""
    model = make(attention_dropout=0.2)
    settings = {"max_steps": 2, "learning_rate": 0.0}
    trainer = make_trainer(model, tmp_path, METHODS["simpo"], apart=True, **settings)
    passes = watched(trainer)
    trainer.train()
    without = [said for graded, said in passes if not graded]
    graded = [said for graded, said in passes if graded]
    for before, after in zip(without, graded, strict=True):
        for stream, said in before.items():
            torch.testing.assert_close(said, after[stream], rtol=0, atol=EXACT)
    rows = trainer.data_collator([trainer.train_dataset[0, at] for at in range(8)])["chosen"]
    dropped = trainer.scorer(model.train(), rows).log_probs
    assert float((dropped - trainer.scorer(model.eval(), rows).log_probs).abs().max()) > 100 * EXACT
