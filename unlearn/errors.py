"""Errors a user can act on. Everything else is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in the input: what was given and what is allowed, plus what to do about it.

    The command line prints it as one line without a traceback and exits with ``exit_code``.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class RunFailed(Exception):
    """The input was fine, the work failed (exit code 1): non-finite gradients, a full disk."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Interrupted(BaseException):
    """The run was stopped on request and can be resumed (exit code 75).

    Like KeyboardInterrupt it is no Exception: it is raised from a signal handler, anywhere, and
    libraries that catch every Exception to try something else would swallow it. ``hint`` says how
    to go on where that is not known from the folder of a run.
    """

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def described(value: Any) -> str:
    """Say what a value in a file is, for the error that wanted something else: "a number (5)"."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    names |= {dict: "an object", str: "a text"}
    return f"{names.get(type(value), 'a ' + type(value).__name__)} ({str(value)[:40]})"


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest allowed name, or an empty string."""
    names = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(given.lower(), list(names), n=1, cutoff=0.6)
    return f"; did you mean '{names[close[0]]}'?" if close else ""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a table: it lists the table."""
    names = sorted(allowed)
    return UserError(
        f"unknown {kind} '{given}'{did_you_mean(given, names)}", f"one of {', '.join(names)}"
    )
