"""The objectives, in one table. An objective never averages: the trainer divides.

To add one: write the function in ``token.py``, ``sequence.py``, ``pair.py``, ``distribution.py`` or
``hidden.py`` and name it in the table below. Its signature says the rest. The names of its
positional parameters ask for data: ``policy`` is what the model being changed says, ``reference``
what the frozen start says. An objective on pairs names both answers instead: ``chosen`` and
``rejected``, and ``chosen_reference`` and ``rejected_reference`` for what the start says of them.
Keyword-only parameters are hyperparameters.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from unlearn.activations import Activations
from unlearn.errors import UserError, did_you_mean, unknown
from unlearn.objectives.distribution import kl, kl_all_positions, kl_labels
from unlearn.objectives.hidden import adaptive_rmu, embed_diff, rmu
from unlearn.objectives.pair import ap, dpo
from unlearn.objectives.sequence import npo
from unlearn.objectives.token import grad_ascent, nll
from unlearn.scores import Scores, label_mask

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
    number is then its hyperparameter ``layer``. ``measured`` names the hyperparameter that a run
    measures at the frozen start, where it is not given.
    """

    function: Callable[..., Tensor]
    unit: str
    reads: Literal["scores", "logits", "hidden"] = "scores"
    measured: str | None = None

    @property
    def name(self) -> str:
        """The name in recipes and on the command line."""
        return self.function.__name__

    @property
    def uses_reference(self) -> bool:
        """Whether the frozen starting model is needed."""
        return any(name.endswith("reference") for name in self.data)

    @property
    def compares(self) -> bool:
        """Whether it is an objective on pairs of answers."""
        return "rejected" in self.data

    @property
    def data(self) -> tuple[str, ...]:
        """The names of the data it is given, in order."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def __call__(
        self,
        policy: Said,
        reference: Said | None = None,
        rejected: Said | None = None,
        rejected_reference: Said | None = None,
        **hyper: Any,
    ) -> Tensor:
        """Give one loss per unit; positions that do not count are 0.

        For an objective on pairs ``policy`` and ``reference`` are about the chosen answers.
        """
        given = {
            **dict.fromkeys(("policy", "chosen"), policy),
            **dict.fromkeys(("reference", "chosen_reference"), reference),
            "rejected": rejected,
            "rejected_reference": rejected_reference,
        }
        losses = self.function(*(given[name] for name in self.data), **hyper)
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
        *(Objective(function, "sequence") for function in (dpo, ap)),
        Objective(kl, "position", reads="logits"),
        Objective(kl_labels, "token", reads="logits"),
        Objective(kl_all_positions, "padded position", reads="logits"),
        *(Objective(function, "token", reads="hidden") for function in (rmu, embed_diff)),
        Objective(adaptive_rmu, "token", reads="hidden", measured="token_norm"),
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


def pair_mistake(name: str, rejected: Any) -> str:
    """Say what is wrong with giving, or not giving, the rejected answers of pairs to an objective.

    Empty when nothing is.
    """
    objective = find(name)
    if objective.compares and rejected is None:
        return f"{name} compares two answers and needs 'rejected', the one to become less likely"
    if not objective.compares and rejected is not None:
        pairs = ", ".join(sorted(n for n, o in OBJECTIVES.items() if o.compares))
        return f"{name} takes no pair: leave 'rejected' out, or use one of {pairs}"
    return ""


def batch_loss(
    name: str,
    policy: Said,
    reference: Said | None = None,
    *,
    rejected: Said | None = None,
    rejected_reference: Said | None = None,
    note: str = "",
    **hyper: Any,
) -> Tensor:
    """Give the batch mean of an objective, as published: the sum over units over their number.

    Args:
        name: an objective's name, for instance ``npo``.
        policy: scores (or activations) of the model being changed.
        reference: those of the frozen start, for objectives that need it.
        rejected: for objectives on pairs, scores of the rejected answers; ``policy`` and
            ``reference`` are then about the chosen ones, row by row.
        rejected_reference: those of the frozen start.
        note: a remark, not used: recorded hyperparameters may carry one.
        **hyper: hyperparameters of the objective.

    Raises:
        UserError: unknown name or hyperparameter, a missing reference, or the wrong thing to read.
    """
    objective = find(name)
    said = (policy, reference, rejected, rejected_reference)
    if mistakes := [*check_hyper(name, hyper), *_missing(objective, hyper, *said)]:
        raise UserError("; ".join(mistakes))
    units = UNITS[objective.unit](policy.mask, policy.attended)
    return objective(*said, **hyper).sum() / units


def _missing(
    objective: Objective,
    hyper: Mapping[str, Any],
    policy: Said,
    reference: Said | None,
    rejected: Said | None,
    rejected_reference: Said | None,
) -> list[str]:
    """Say what an objective lacks before it can be computed."""
    name, mistakes = objective.name, []
    if wrong := pair_mistake(objective.name, rejected):
        mistakes.append(wrong)
    if objective.uses_reference and reference is None:
        mistakes.append(f"{name} needs a reference model")
    elif objective.uses_reference and objective.compares and rejected_reference is None:
        mistakes.append(f"{name} needs a reference model for the rejected answers too")
    if objective.measured and hyper.get(objective.measured) is None:
        mistakes.append(f"{name} needs {objective.measured}, which only a run measures by itself")
    return mistakes + _unreadable(objective, policy, reference, rejected, rejected_reference)


def _unreadable(objective: Objective, *given: Said | None) -> list[str]:
    """Say what an objective lacks in what it was given."""
    needed = Activations if objective.reads == "hidden" else Scores
    for said in (said for said in given if said is not None):
        if not isinstance(said, needed):
            return [f"{objective.name} reads {needed.__name__}, not {type(said).__name__}"]
        if objective.reads == "logits" and said.logits is None:  # type: ignore[union-attr]
            return [f"{objective.name} needs scores with logits: score(..., want={{'logits'}})"]
    return []
