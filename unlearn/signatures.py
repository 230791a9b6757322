"""Functions whose signature is their declaration: keyword-only parameters are hyperparameters."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from unlearn.errors import did_you_mean


def hyperparameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Give the keyword-only parameters with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def hyper_mistakes(function: Callable[..., Any], hyper: Mapping[str, Any]) -> list[str]:
    """List what is wrong with hyperparameters given to a function: one message per mistake."""
    name, allowed = function.__name__, hyperparameters(function)
    mistakes = [
        f"unknown hyperparameter '{key}' of {name}{did_you_mean(key, allowed)} "
        f"(allowed: {', '.join(allowed) or 'none'})"
        for key in hyper
        if key not in allowed
    ]
    hints = get_type_hints(function, include_extras=True)
    for key in [key for key in hyper if key in allowed]:
        try:
            TypeAdapter(hints[key]).validate_python(hyper[key], strict=True)
        except ValidationError as error:
            why = error.errors()[0]
            own = why.get("ctx", {}).get("error")  # a type of ours says what was given
            mistakes.append(
                f"{key} of {name}: {own}"
                if own
                else f"{key} of {name} is {hyper[key]!r}: {why['msg']}"
            )
    return mistakes
