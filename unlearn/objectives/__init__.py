"""The objectives, in one table. An objective never averages: the trainer divides.

To add one: write the function in the file of its kind (``token.py``, ``sequence.py``, ``pair.py``,
``labelled.py``, …) and name it in the table below. Its signature says the rest. The names of its
positional parameters ask for data: ``policy`` is what the model being changed says, ``reference``
what the frozen start says. An objective on pairs names both answers instead: ``chosen`` and
``rejected``, and ``chosen_reference`` and ``rejected_reference`` for what the start says of them.
Keyword-only parameters are hyperparameters. One that remembers something between steps is a
dataclass with ``__call__``, see ``dual.py``. A loss of your own needs no table: its name is
``FILE.py:FUNCTION``, see ``user.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from unlearn.activations import Activations
from unlearn.errors import UserError, unknown
from unlearn.objectives import weighting
from unlearn.objectives.distribution import (
    kl,
    kl_all_positions,
    kl_labels,
    uniform,
    uniform_all_positions,
)
from unlearn.objectives.dual import pdu_retain
from unlearn.objectives.hidden import adaptive_rmu, embed_diff, rmu
from unlearn.objectives.labelled import ceu, max_entropy, pdu, undial, undial_all_positions
from unlearn.objectives.pair import ap, dpo, preference, simpo
from unlearn.objectives.reweighted import (
    ga_annotated,
    ga_sampled,
    satimp,
    simimp,
    simsat,
    tnpo,
    wga,
    wtnpo,
)
from unlearn.objectives.sequence import npo, npo_annotated, npo_sampled, simnpo
from unlearn.objectives.signature import data_names
from unlearn.objectives.token import grad_ascent, nll
from unlearn.objectives.user import is_user_loss, load_user_loss
from unlearn.objectives.verified import answer_ascent, answer_nll, dco, ent_nll, topr
from unlearn.scores import Scores, label_mask
from unlearn.signatures import hyper_mistakes, hyperparameters

Said = Scores | Activations
"""What a model says about a batch, in the form that an objective reads."""

Hyper = Mapping[str, Any]

UNITS: dict[str, Callable[[Tensor, Tensor, Hyper], Tensor]] = {
    "token": lambda mask, attended, hyper: mask.sum(),
    "sequence": lambda mask, attended, hyper: attended.any(-1).sum(),
    "position": lambda mask, attended, hyper: attended.sum(),
    "padded position": lambda mask, attended, hyper: attended.any(-1).sum() * mask.shape[1],
    "next token": lambda mask, attended, hyper: attended[:, 1:].sum(),
    "later token": lambda mask, attended, hyper: (
        (mask.sum(-1) - hyper["ignore_first_n_answer_tokens"]).clamp_min(0).sum()
    ),
    "granule": lambda mask, attended, hyper: UNITS[
        "token" if hyper["granularity"] in ("token", "group") else "sequence"
    ](mask, attended, hyper),
}
"""How many units of each kind a batch has: of its label mask, attention mask and hyperparameters.

A row without any real token, which only fills up a batch, has none.
"""


@dataclass(frozen=True)
class Objective:
    """A pure function of what a model says, and what it needs: its signature and table say it.

    It reads ``scores``, scores with the logits at ``labelled`` positions or with all ``logits``, or
    the ``hidden`` states that leave a layer, whose number is then its hyperparameter ``layer``.
    ``annotated``: the rows must have a column ``important``. ``most_tokens``: of longer answers
    (labelled tokens, on average) it says nothing. ``couples_rows`` tells for which
    hyperparameters the rows of one forward pass weigh on each other. ``measured`` names the
    hyperparameter that a run measures at the frozen start, where it is not given. ``sha256``: of
    the file that a loss from outside this table comes from.
    """

    function: Callable[..., Any]
    unit: str
    reads: Literal["scores", "labelled", "logits", "hidden"] = "scores"
    annotated: bool = False
    couples_rows: Callable[[Hyper], bool] = lambda hyper: False
    measured: str | None = None
    sha256: str | None = None
    most_tokens: int | None = None

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
    def data(self) -> list[str]:
        """The names of the data it is given, in order."""
        return data_names(self.function)

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters with their defaults."""
        return hyperparameters(self.function)

    def bound(self, hyper: Hyper) -> Callable[..., Tensor]:
        """Give the loss of ``(policy)`` or ``(policy, reference)``; a stateful one begins anew."""
        if isinstance(self.function, type):
            return self.function(**hyper)
        return partial(self.function, **hyper)

    def __call__(self, *said: Said | None, **hyper: Any) -> Tensor:
        """Give one loss per unit; positions that do not count are 0. See :meth:`apply`."""
        return self.apply(self.bound(hyper), *said)

    def apply(
        self,
        bound: Callable[..., Tensor],
        policy: Said | None,
        reference: Said | None = None,
        rejected: Said | None = None,
        rejected_reference: Said | None = None,
    ) -> Tensor:
        """Give one loss per unit of a loss that :meth:`bound` has made.

        For an objective on pairs ``policy`` and ``reference`` are about the chosen answers.
        """
        assert policy is not None
        given = {
            **dict.fromkeys(("policy", "chosen"), policy),
            **dict.fromkeys(("reference", "chosen_reference"), reference),
            "rejected": rejected,
            "rejected_reference": rejected_reference,
        }
        losses = bound(*(given[name] for name in self.data))
        empty = ~policy.attended.any(-1)
        return losses.masked_fill(empty.reshape(-1, *[1] * (losses.dim() - 1)), 0.0)

    def count(self, batch: Mapping[str, Tensor], hyper: Hyper | None = None) -> Tensor:
        """Count this objective's units in a batch, before any forward pass."""
        attended = batch["attention_mask"].bool()
        return self.units(label_mask(batch["labels"]), attended, hyper or {})

    def units(self, mask: Tensor, attended: Tensor, hyper: Hyper) -> Tensor:
        """Count units from the label mask and the attention mask."""
        return UNITS[self.unit](mask, attended, {**self.hyper, **hyper})


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        *(Objective(f, "token") for f in (nll, grad_ascent, wga, tnpo, wtnpo, ga_sampled)),
        *(
            Objective(f, "granule", couples_rows=weighting.couples_rows)
            for f in (satimp, simsat, simimp)
        ),
        Objective(ga_annotated, "token", annotated=True),
        *(Objective(f, "sequence") for f in (npo, npo_sampled, simnpo, dpo, ap)),
        *(Objective(f, "sequence") for f in (answer_nll, answer_ascent, topr, preference, simpo)),
        Objective(dco, "sequence", most_tokens=64),
        Objective(ent_nll, "token", reads="labelled"),
        Objective(npo_annotated, "sequence", annotated=True),
        Objective(kl, "position", reads="logits"),
        Objective(kl_labels, "token", reads="logits"),
        Objective(kl_all_positions, "padded position", reads="logits"),
        Objective(uniform, "position", reads="logits"),
        Objective(uniform_all_positions, "padded position", reads="logits"),
        *(Objective(f, "token", reads="labelled") for f in (undial, max_entropy, pdu)),
        Objective(undial_all_positions, "next token", reads="logits"),
        Objective(ceu, "later token", reads="labelled"),
        Objective(pdu_retain, "token"),
        *(Objective(f, "token", reads="hidden") for f in (rmu, embed_diff)),
        Objective(adaptive_rmu, "token", reads="hidden", measured="token_norm"),
    )
}


def find(name: str) -> Objective:
    """Look an objective up: a name of the table, or ``FILE.py:FUNCTION``.

    Raises:
        UserError: an unknown name, with the list; a file, function or signature that will not do.
    """
    if is_user_loss(name):
        loss = load_user_loss(name)
        return Objective(loss.function, loss.unit, reads=loss.reads, sha256=loss.sha256)
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def check_hyper(name: str, hyper: Mapping[str, Any]) -> list[str]:
    """List what is wrong with these hyperparameters: one message per mistake."""
    return hyper_mistakes(find(name).function, hyper)


def pair_mistake(objective: Objective, rejected: Any) -> str:
    """Say what is wrong with giving, or not giving, the rejected answers of pairs to an objective.

    Empty when nothing is.
    """
    name = objective.name
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
        name: an objective's name, for instance ``npo``, or ``FILE.py:FUNCTION``.
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
    units = objective.units(policy.mask, policy.attended, hyper)
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
    if wrong := pair_mistake(objective, rejected):
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
        if isinstance(said, Scores) and not _has(said, objective.reads):
            want = objective.reads
            return [f"{objective.name} needs scores with logits: score(..., want={{{want!r}}})"]
    if objective.annotated and getattr(given[0], "important", None) is None:
        return [f"{objective.name} needs rows with a column 'important'"]
    return []


def _has(scores: Scores, reads: str) -> bool:
    whole = scores.logits is not None
    return {"labelled": whole or scores.labelled is not None, "logits": whole}.get(reads, True)
