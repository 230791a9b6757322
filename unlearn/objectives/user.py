"""A loss of the user's own: ``FILE.py:FUNCTION`` in place of an objective's name.

The file is Python code and is run when the recipe is checked. The function obeys the rules of
:mod:`unlearn.objectives.signature` and is tried once on made-up scores, so that what is wrong with
it is said before any work. What it says about itself beyond its signature are attributes of the
function: ``unit`` (where the returned shape does not say it) and ``reads``.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlearn.activations import Activations
from unlearn.errors import UserError, did_you_mean
from unlearn.objectives.signature import (
    READS,
    data_names,
    signature_mistakes,
    unit_of,
)
from unlearn.scores import Scores
from unlearn.signatures import hyperparameters

MARK = ".py:"
HINT = (
    "def FUNCTION(policy: Scores, *, beta: float = 1.0) -> Float[Tensor, 'batch seq'], and "
    "reference: Scores after policy if it needs the frozen start"
)
UNIT_HINT = "annotate what it returns: Float[Tensor, 'batch seq'] or Float[Tensor, ' batch']"
SHAPES = {"sequence": (2,), "token": (2, 4), "position": (2, 4)}


@dataclass(frozen=True)
class UserLoss:
    """A checked function, its unit, what it reads, and the SHA-256 of its file."""

    function: Callable[..., Any]
    unit: str
    reads: Any
    sha256: str


def is_user_loss(name: str) -> bool:
    """Tell ``FILE.py:FUNCTION`` from a name of the table."""
    return MARK in name


def load_user_loss(name: str) -> UserLoss:
    """Run the file and check the function.

    Raises:
        UserError: one line that says what is wrong.
    """
    file, _, function_name = name.rpartition(":")
    path = Path(file).expanduser()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the loss '{name}': {error.strerror}", HINT) from None
    return _load(name, path.absolute(), function_name, hashlib.sha256(source).hexdigest())


@lru_cache
def _load(name: str, path: Path, function_name: str, sha256: str) -> UserLoss:
    """Load each version of a file once."""
    function = _function(name, _module(name, path, sha256), function_name)
    try:
        mistakes = list(signature_mistakes(function))
        unit, reads = unit_of(function), getattr(function, "reads", "scores")
    except (NameError, TypeError, ValueError) as error:  # an annotation that means nothing
        raise UserError(f"the signature of the loss '{name}' cannot be read: {error}") from None
    if mistakes:
        raise UserError(f"the loss '{name}' will not do: {'; '.join(mistakes)}", HINT)
    if unit not in SHAPES:
        given = f"its unit is {unit!r}" if unit else "it does not say what it gives a value for"
        raise UserError(f"the loss '{name}' will not do: {given}", UNIT_HINT)
    if reads not in READS:
        raise UserError(f"the loss '{name}' reads {reads!r}", f"one of {', '.join(READS)}")
    if reads == "hidden" and "layer" not in hyperparameters(function):
        message = f"the loss '{name}' reads hidden states, but has no hyperparameter 'layer'"
        raise UserError(message, "add layer: int = 7 after the lone *")
    loss = UserLoss(function, unit, reads, sha256)
    _rehearse(name, loss)
    return loss


def _module(name: str, path: Path, sha256: str) -> Any:
    title = f"unlearn_user_loss_{sha256[:16]}"
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # dataclasses and annotations look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[title]
        raise UserError(f"the file of the loss '{name}' does not run: {_said(error)}") from error
    return module


def _function(name: str, module: Any, function_name: str) -> Callable[..., Any]:
    found = getattr(module, function_name, None)
    if callable(found):
        function: Callable[..., Any] = found
        return function
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    close = did_you_mean(function_name, own)
    raise UserError(
        f"the loss '{name}': its file has no function '{function_name}'{close}",
        f"it has {', '.join(own) or 'none'}",
    )


def _rehearse(name: str, loss: UserLoss) -> None:
    """Try a loss on two made-up rows: it must run, and give one value per unit with a gradient."""
    bound = loss.function() if isinstance(loss.function, type) else loss.function
    arguments = [_made_up(loss.reads) for _ in data_names(loss.function)]
    try:
        losses = bound(*arguments)
    except Exception as error:
        message = f"the loss '{name}' fails on two made-up rows: {_said(error)}"
        raise UserError(message, "see unlearn.objectives for losses that work") from error
    wanted = SHAPES[loss.unit]
    if not isinstance(losses, Tensor) or losses.shape != wanted:
        given = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UserError(
            f"the loss '{name}' gives {given} for 2 rows of 4 tokens, not {list(wanted)}",
            f"one value per {loss.unit}, and no mean: the trainer divides. {UNIT_HINT}",
        )
    _check_values(name, loss, losses, arguments[0].mask)
    if not losses.requires_grad:
        raise UserError(f"the loss '{name}' has no gradient", "compute it from policy in torch")


def _check_values(name: str, loss: UserLoss, losses: Tensor, mask: Tensor) -> None:
    """Refuse numbers that no training could use."""
    if not losses.isfinite().all():
        raise UserError(
            f"the loss '{name}' is not finite on two made-up rows",
            "look for the log of 0, and for a division by the number of something absent",
        )
    if loss.unit == "token" and losses[~mask].any():
        raise UserError(
            f"the loss '{name}' gives values where no token is labelled",
            "multiply it by policy.mask: only labelled tokens are counted",
        )


def _made_up(reads: str) -> Scores | Activations:
    """Give two rows of four tokens, the last two labelled, with everything a loss may read."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, 4, 8, generator=generator).requires_grad_()
    labels = torch.tensor([[-100, -100, 3, 4], [-100, -100, 5, 6]])
    if reads == "hidden":
        return Activations.of(
            numbers, {"labels": labels, "attention_mask": torch.ones_like(labels)}
        )
    scores = Scores.from_logits(numbers, labels)
    return scores if reads in ("labelled", "logits") else replace(scores, logits=None)


def _said(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
