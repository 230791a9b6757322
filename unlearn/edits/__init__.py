"""Edits, in one table: ``(model, …, **hyper) -> model``, for what is not a sum of loss terms.

To add one: write the function in a module here and name it in the table. Its signature says what it
asks for, beside the model as it was before unlearning: ``tuned``, that model trained on the
recipe's terms; ``data``, the tokenised rows by stream; ``tokenizer``, the model's; ``listen``, who
is told of events as a run knows them; ``seed``, the run's; ``keep``, a file where it may keep what
it has done so far, so that a later call goes on from there. One that does not ask for ``tuned``
trains nothing: its recipe has no terms, and every process of a launch calls it. Keyword-only
parameters are hyperparameters.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unlearn.edits import reapply as again
from unlearn.edits import sae as clamping
from unlearn.edits.factors import check_factors
from unlearn.edits.kfade import kfade, settings_mistake
from unlearn.edits.task_vector import task_vector
from unlearn.errors import unknown
from unlearn.signatures import hyper_mistakes, hyperparameters


@dataclass(frozen=True)
class Edit:
    """A function that changes a model's weights, and what it asks for."""

    function: Callable[..., Any]
    check: Callable[[Mapping[str, Any]], str | None] = lambda hyper: None
    """Says what is wrong with all hyperparameters together, when each is right by itself."""
    ready: Callable[..., None] | None = None
    """Refuses what does not belong to a loaded model and its retain rows, before they are measured:
    ``(model, retain, hyper, seed=…, start=…)`` with all hyperparameters and the weights' hash."""

    @property
    def name(self) -> str:
        """The name in recipes."""
        return self.function.__name__

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters with their defaults."""
        return hyperparameters(self.function)

    def filled(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Give all hyperparameters: those given, and the defaults of the others."""
        return {**self.hyper, **given}

    def asks(self, what: str) -> bool:
        """Tell whether it takes ``tuned``, ``data`` or another of what is named above."""
        return what in inspect.signature(self.function).parameters

    def __call__(self, model: Any, given: Mapping[str, Any], **hyper: Any) -> Any:
        """Give the edited model; ``given`` may hold more than is asked for."""
        asked = {name: value for name, value in given.items() if self.asks(name)}
        return self.function(model, **asked, **hyper)


EDITS: dict[str, Edit] = {
    edit.name: edit
    for edit in (
        Edit(task_vector),
        Edit(kfade, settings_mistake, check_factors),
        Edit(again.reapply, again.settings_mistake),
        Edit(clamping.sae, clamping.settings_mistake),
    )
}


def find(name: str) -> Edit:
    """Look an edit up by name; raise :class:`UserError` with the list when it is unknown."""
    if name not in EDITS:
        raise unknown("edit", name, EDITS)
    return EDITS[name]


def check_hyper(name: str, hyper: Mapping[str, Any]) -> list[str]:
    """List what is wrong with these hyperparameters: one message per mistake."""
    return hyper_mistakes(find(name).function, hyper)


def terms_mistake(name: str, trains: bool) -> str | None:
    """Say what is wrong with terms beside this edit, or with none; None when nothing is."""
    if find(name).asks("tuned"):
        return None if trains else f"none given; edit {name} needs a model that terms have trained"
    return f"given with edit {name}, which trains nothing: leave terms out" if trains else None
