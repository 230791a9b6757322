"""The objectives, in one table. An objective never averages: the trainer divides.

To add one: write the function in ``token.py``, ``sequence.py`` or ``distribution.py`` and name it
in the table below. Its signature says the rest: a ``reference`` parameter asks for the frozen
starting model, keyword-only parameters are hyperparameters.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from unlearn.errors import UserError, did_you_mean, unknown
from unlearn.objectives.distribution import kl, kl_all_positions, kl_labels
from unlearn.objectives.sequence import npo
from unlearn.objectives.token import grad_ascent, nll
from unlearn.scores import Scores, label_mask

UNITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda mask, attended: mask.sum(),
    "sequence": lambda mask, attended: torch.tensor(len(mask), device=mask.device),
    "position": lambda mask, attended: attended.sum(),
    "padded position": lambda mask, attended: torch.tensor(mask.numel(), device=mask.device),
}
"""How many units of each kind a batch has, from its label mask and its attention mask."""


@dataclass(frozen=True)
class Objective:
    """A pure function of scores, and what it needs: read off its signature and its table."""

    function: Callable[..., Tensor]
    unit: str
    reads_logits: bool = False

    @property
    def name(self) -> str:
        """The name in recipes and on the command line."""
        return self.function.__name__

    @property
    def uses_reference(self) -> bool:
        """Whether the frozen starting model is needed."""
        return "reference" in inspect.signature(self.function).parameters

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def __call__(self, policy: Scores, reference: Scores | None, **hyper: Any) -> Tensor:
        """Give one loss per unit; positions that do not count are 0."""
        scores = (policy, reference) if self.uses_reference else (policy,)
        return self.function(*scores, **hyper)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Count this objective's units in a batch, before any forward pass."""
        return UNITS[self.unit](label_mask(batch["labels"]), batch["attention_mask"].bool())


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        *(Objective(function, "token") for function in (nll, grad_ascent)),
        *(Objective(function, "sequence") for function in (npo,)),
        Objective(kl, "position", reads_logits=True),
        Objective(kl_labels, "token", reads_logits=True),
        Objective(kl_all_positions, "padded position", reads_logits=True),
    )
}


def find(name: str) -> Objective:
    """Look an objective up by name; raise :class:`UserError` with the list when it is unknown."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def check_hyper(name: str, hyper: Mapping[str, Any]) -> list[str]:
    """List what is wrong with these hyperparameters: one message per mistake."""
    allowed = find(name).hyper
    mistakes = [
        f"unknown hyperparameter '{key}' of {name}{did_you_mean(key, allowed)} "
        f"(allowed: {', '.join(allowed) or 'none'})"
        for key in hyper
        if key not in allowed
    ]
    hints = get_type_hints(find(name).function, include_extras=True)
    for key in [key for key in hyper if key in allowed]:
        try:
            TypeAdapter(hints[key]).validate_python(hyper[key], strict=True)
        except ValidationError as error:
            mistakes.append(f"{key} of {name} is {hyper[key]!r}: {error.errors()[0]['msg']}")
    return mistakes


def batch_loss(
    name: str, policy: Scores, reference: Scores | None = None, *, note: str = "", **hyper: Any
) -> Tensor:
    """Give the batch mean of an objective, as published: the sum over units over their number.

    Args:
        name: an objective's name, for instance ``npo``.
        policy: scores of the model being changed.
        reference: scores of the frozen start, for objectives that need it.
        note: a remark, not used: recorded hyperparameters may carry one.
        **hyper: hyperparameters of the objective.

    Raises:
        UserError: unknown name or hyperparameter, or a missing reference.
    """
    objective = find(name)
    mistakes = check_hyper(name, hyper)
    if objective.uses_reference and reference is None:
        mistakes.append(f"{name} needs the scores of a reference model")
    if objective.reads_logits and (
        policy.logits is None or (reference and reference.logits is None)
    ):
        mistakes.append(f"{name} needs scores with logits: score(..., want={{'logits'}})")
    if mistakes:
        raise UserError("; ".join(mistakes))
    units = UNITS[objective.unit](policy.mask, policy.attended)
    return objective(policy, reference, **hyper).sum() / units
