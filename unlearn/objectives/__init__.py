"""The objectives, in one table. An objective never averages: the trainer divides.

To add one: write the function in ``token.py``, ``sequence.py``, ``distribution.py`` or
``hidden.py`` and name it in the table below. Its signature says the rest: a ``reference`` parameter
asks for the frozen starting model, keyword-only parameters are hyperparameters.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from unlearn.activations import Activations
from unlearn.errors import UserError, unknown
from unlearn.objectives.distribution import (
    kl,
    kl_all_positions,
    kl_labels,
    uniform,
    uniform_all_positions,
)
from unlearn.objectives.hidden import embed_diff, rmu
from unlearn.objectives.sequence import npo
from unlearn.objectives.token import grad_ascent, nll
from unlearn.scores import Scores, label_mask
from unlearn.signatures import hyper_mistakes, hyperparameters

Said = Scores | Activations
"""What a model says about a batch, in the form that an objective reads."""

UNITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda mask, attended: mask.sum(),
    "sequence": lambda mask, attended: attended.any(-1).sum(),
    "position": lambda mask, attended: attended.sum(),
    "padded position": lambda mask, attended: attended.any(-1).sum() * mask.shape[1],
}
"""How many units of each kind a batch has, from its label mask and its attention mask.

A row without any real token, which only fills up a batch, has none.
"""


@dataclass(frozen=True)
class Objective:
    """A pure function of what a model says, and what it needs: its signature and table say it.

    It reads ``scores``, scores with ``logits``, or the ``hidden`` states that leave a layer, whose
    number is then its hyperparameter ``layer``.
    """

    function: Callable[..., Tensor]
    unit: str
    reads: Literal["scores", "logits", "hidden"] = "scores"

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
        return hyperparameters(self.function)

    def __call__(self, policy: Said, reference: Said | None, **hyper: Any) -> Tensor:
        """Give one loss per unit; positions that do not count are 0."""
        scores = (policy, reference) if self.uses_reference else (policy,)
        losses = self.function(*scores, **hyper)
        empty = ~policy.attended.any(-1)
        return losses.masked_fill(empty.reshape(-1, *[1] * (losses.dim() - 1)), 0.0)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Count this objective's units in a batch, before any forward pass."""
        return UNITS[self.unit](label_mask(batch["labels"]), batch["attention_mask"].bool())


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        *(Objective(function, "token") for function in (nll, grad_ascent)),
        *(Objective(function, "sequence") for function in (npo,)),
        Objective(kl, "position", reads="logits"),
        Objective(kl_labels, "token", reads="logits"),
        Objective(kl_all_positions, "padded position", reads="logits"),
        Objective(uniform, "position", reads="logits"),
        Objective(uniform_all_positions, "padded position", reads="logits"),
        *(Objective(function, "token", reads="hidden") for function in (rmu, embed_diff)),
    )
}


def find(name: str) -> Objective:
    """Look an objective up by name; raise :class:`UserError` with the list when it is unknown."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def check_hyper(name: str, hyper: Mapping[str, Any]) -> list[str]:
    """List what is wrong with these hyperparameters: one message per mistake."""
    return hyper_mistakes(find(name).function, hyper)


def batch_loss(
    name: str, policy: Said, reference: Said | None = None, *, note: str = "", **hyper: Any
) -> Tensor:
    """Give the batch mean of an objective, as published: the sum over units over their number.

    Args:
        name: an objective's name, for instance ``npo``.
        policy: scores (or activations) of the model being changed.
        reference: those of the frozen start, for objectives that need it.
        note: a remark, not used: recorded hyperparameters may carry one.
        **hyper: hyperparameters of the objective.

    Raises:
        UserError: unknown name or hyperparameter, a missing reference, or the wrong thing to read.
    """
    objective = find(name)
    mistakes = check_hyper(name, hyper)
    if objective.uses_reference and reference is None:
        mistakes.append(f"{name} needs a reference model")
    mistakes += _unreadable(objective, policy, reference)
    if mistakes:
        raise UserError("; ".join(mistakes))
    units = UNITS[objective.unit](policy.mask, policy.attended)
    return objective(policy, reference, **hyper).sum() / units


def _unreadable(objective: Objective, *given: Said | None) -> list[str]:
    """Say what an objective lacks in what it was given."""
    needed = Activations if objective.reads == "hidden" else Scores
    for said in (said for said in given if said is not None):
        if not isinstance(said, needed):
            return [f"{objective.name} reads {needed.__name__}, not {type(said).__name__}"]
        if objective.reads == "logits" and said.logits is None:  # type: ignore[union-attr]
            return [f"{objective.name} needs scores with logits: score(..., want={{'logits'}})"]
    return []
