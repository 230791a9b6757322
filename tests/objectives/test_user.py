"""A loss of the user's own: the same rules, one clear line for each mistake, before any work."""

from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import UserError
from unlearn.objectives import batch_loss, check_hyper, find
from unlearn.scores import Scores

HEAD = """
import torch
from jaxtyping import Float
from torch import Tensor
from unlearn.scores import Scores
"""
GOOD = """
def my_loss(policy: Scores, *, beta: float = 2.0) -> Float[Tensor, "batch seq"]:
    return beta * policy.log_probs

def my_npo(policy: Scores, reference: Scores) -> Float[Tensor, " batch"]:
    return policy.sequence - reference.sequence

def spread(policy: Scores) -> Float[Tensor, "batch seq"]:
    return policy.logits.var(-1) * policy.attended

spread.reads, spread.unit = "logits", "position"
"""


@pytest.fixture
def spec(tmp_path: Path) -> Any:
    def write(text: str, name: str = "my_loss") -> str:
        (tmp_path / "mine.py").write_text(HEAD + text)
        return f"{tmp_path / 'mine.py'}:{name}"

    return write


def test_signature_and_attributes_say_everything(spec: Any) -> None:
    mine = find(spec(GOOD))
    assert (mine.name, mine.unit, mine.reads) == ("my_loss", "token", "scores")
    assert (mine.hyper, mine.uses_reference) == ({"beta": 2.0}, False)
    other = find(spec(GOOD, "my_npo"))
    assert (other.unit, other.uses_reference) == ("sequence", True)
    whole = find(spec(GOOD, "spread"))
    assert (whole.unit, whole.reads) == ("position", "logits")
    assert check_hyper(spec(GOOD), {"betta": 1.0})[0].endswith(
        "my_loss; did you mean 'beta'? (allowed: beta)"
    )
    assert len(check_hyper(spec(GOOD), {"beta": "x"})) == 1


def test_it_gives_what_the_table_gives(spec: Any) -> None:
    import torch

    labels = torch.tensor([[-100, 1, 2, 3]])
    scores = Scores.from_logits(torch.randn(1, 4, 5), labels)
    ours = batch_loss(spec(GOOD), scores, beta=1.0)
    torch.testing.assert_close(ours, batch_loss("grad_ascent", scores))


def test_a_changed_file_is_another_loss(spec: Any) -> None:
    before = find(spec(GOOD))
    after = find(spec(GOOD.replace("2.0", "3.0")))
    assert before.sha256 != after.sha256
    assert after.hyper == {"beta": 3.0}


SIGNATURE = 'def my_loss({}) -> Float[Tensor, "batch seq"]:\n    return policy.log_probs'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def my_los(policy: Scores): ...", "has no function 'my_loss'; did you mean 'my_los'?"),
        ("x = 1 / 0", "does not run: ZeroDivisionError: division by zero"),
        ("def my_loss(", "does not run: SyntaxError"),
        (SIGNATURE.format("scores: Scores"), "must be policy; or policy, reference; or chosen,"),
        (SIGNATURE.format("policy: Scores, beta: float = 1"), "given: policy, beta"),
        (SIGNATURE.format("policy: Scores, *, beta=1.0"), "hyperparameter 'beta' has no type"),
        (SIGNATURE.format("policy: Scores, *, beta: float"), "'beta' has no default"),
        (SIGNATURE.format("policy: Scores, **rest: float"), "*rest is not allowed"),
        (SIGNATURE.format("policy: Nothing"), "name 'Nothing' is not defined"),
        ("def my_loss(policy: Scores):\n    return policy.log_probs", "does not say what it gives"),
        ('def my_loss(policy: Scores) -> Float[Tensor, " b"]:\n    return policy.log_probs.mean()',
         "gives [] for 2 rows of 4 tokens, not [2]"),
        ('def my_loss(policy: Scores) -> Float[Tensor, " b"]:\n    return policy.sequence.detach()',
         "has no gradient"),
        ('def my_loss(policy: Scores) -> Float[Tensor, " b"]:\n    return policy.logits.sum(-1)',
         "fails on two made-up rows: AttributeError"),
        (SIGNATURE.format("policy: Scores") + " * float('nan')", "is not finite on two"),
        (SIGNATURE.format("policy: Scores") + " + 1", "values where no token is labelled"),
        (GOOD + "my_loss.reads = 'everything'", "reads 'everything'"),
        (GOOD + "my_loss.reads = 'hidden'", "has no hyperparameter 'layer'"),
        (GOOD + "my_loss.unit = 'row'", "its unit is 'row'"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line(text: str, why: str, spec: Any) -> None:
    with pytest.raises(UserError) as caught:
        find(spec(text))
    assert why in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read the loss 'no/where\.py:f': No such file"):
        find("no/where.py:f")
