"""What a loss asks for, read from its signature; and what is wrong with a signature.

The rules hold for the table's own objectives and for a user's: positional parameters named
``policy`` and, for those that need the frozen start, ``reference``; on pairs of answers ``chosen``
and ``rejected``, and then ``chosen_reference`` and ``rejected_reference``; hyperparameters
keyword-only, annotated, with a default. A class gives its hyperparameters to the constructor and
its data to ``__call__``.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

from unlearn.signatures import hyperparameters

PAIR = ["chosen", "rejected"]
DATA = (
    ["policy"],
    ["policy", "reference"],
    PAIR,
    [*PAIR, "chosen_reference", "rejected_reference"],
)
READS = ("scores", "labelled", "logits", "hidden")


def data_names(function: Callable[..., Any]) -> list[str]:
    """Name the positional parameters: what a loss reads."""
    if isinstance(function, type):
        return _positional(function.__call__)[1:]  # without self
    return _positional(function)


def hyper_types(function: Callable[..., Any]) -> dict[str, Any]:
    """Give the annotations of all parameters."""
    return get_type_hints(function, include_extras=True)


def unit_of(function: Callable[..., Any]) -> str | None:
    """Say what a loss gives one value for; None when it does not say.

    Its attribute ``unit`` decides; else the shape it is annotated to return: one dimension is one
    value per ``sequence``, two are one per labelled ``token``.
    """
    if declared := getattr(function, "unit", None):
        return str(declared)
    call = function.__call__ if isinstance(function, type) else function
    shape = getattr(get_type_hints(call).get("return"), "dim_str", "")
    return {1: "sequence", 2: "token"}.get(len(shape.split()))


def signature_mistakes(function: Callable[..., Any]) -> Iterator[str]:
    """Say what is wrong with a loss's signature, one text per mistake."""
    if (names := data_names(function)) not in DATA:
        given = ", ".join(names) or "none"
        allowed = "; or ".join(", ".join(names) for names in DATA)
        yield f"its positional parameters must be {allowed}; given: {given}"
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    for name in (p.name for p in parameters if p.kind in kinds):
        yield f"*{name} is not allowed: hyperparameters are named after a lone *"
    types = hyper_types(function)
    for name, default in hyperparameters(function).items():
        if name not in types:
            yield f"hyperparameter '{name}' has no type: write {name}: float, for instance"
        if default is inspect.Parameter.empty:
            yield f"hyperparameter '{name}' has no default: write {name}: … = VALUE"


def _positional(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in parameters if p.kind in kinds]
