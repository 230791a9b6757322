"""Which changes let a checkpoint go on, and which do not."""

from typing import Any

import pytest

from unlearn.checkpoints import differences
from unlearn.recipes.identity import training_identity
from unlearn.recipes.prepare import prepare

TWO = ("launch.nproc=2", "launch.engine=ddp")


@pytest.fixture
def identity(recipe: Any) -> Any:
    def of(*changes: str, weights: str = "a" * 64) -> dict[str, Any]:
        return training_identity(prepare(recipe("npo", *changes), offline=True), weights)

    return of


@pytest.mark.parametrize(
    "changes",
    [
        ("training.save_steps=3",),
        ("training.save_total_limit=9",),
        ("evals.max_rows=2",),
        ("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"),
        ("training.global_batch_size=4",),
        ("training.gradient_accumulation_steps=1", *TWO),
    ],
)
def test_the_same_steps(changes: tuple[str, ...], identity: Any) -> None:
    assert differences(identity(), identity(*changes)) == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (("training.learning_rate=0.5",), "training.learning_rate 0.01, here 0.5"),
        (("beta=0.2",), "terms ["),
        (("model.lora={}",), "model.lora null, here {"),
        (("training.gradient_accumulation_steps=1",), "rows_per_step 4, here 2"),
        (("launch.nproc=2",), "rows_per_step 4, here 8"),
        (("data.max_length=17",), "forget rows "),
        (("training.gradient_accumulation_steps=1", "launch.nproc=2", "launch.engine=zero3"),
         'launch.engine "none or ddp", here "zero3"; processes null, here 2'),
    ],
)  # fmt: skip
def test_other_steps(changes: tuple[str, ...], why: str, identity: Any) -> None:
    assert why in differences(identity(), identity(*changes))


def test_other_weights(identity: Any) -> None:
    assert differences(identity(), identity(weights="b" * 64)).startswith('model weights "aaa')
