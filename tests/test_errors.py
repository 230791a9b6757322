"""Errors a user can act on."""

import pytest

from unlearn.errors import Interrupted, UserError, did_you_mean, unknown

METHODS = ["grad_ascent", "grad_diff", "kl_min", "npo"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("npoo", "npo"), ("NPO", "npo"), ("grad_assent", "grad_ascent"), ("kl-min", "kl_min")],
)
def test_the_closest_name_is_suggested(given: str, meant: str) -> None:
    assert did_you_mean(given, METHODS) == f"; did you mean '{meant}'?"


def test_names_keep_their_own_case() -> None:
    assert did_you_mean("forget_q_a_prop", ["forget_Q_A_Prob"]).endswith("'forget_Q_A_Prob'?")


@pytest.mark.parametrize("given", ["", "xyz", "quantum"])
def test_nothing_close_nothing_suggested(given: str) -> None:
    assert did_you_mean(given, METHODS) == ""
    assert did_you_mean(given, []) == ""


def test_unknown_names_list_the_table_in_order() -> None:
    error = unknown("method", "npoo", reversed(METHODS))
    assert error.message == "unknown method 'npoo'; did you mean 'npo'?"
    assert error.hint == "one of grad_ascent, grad_diff, kl_min, npo"
    assert str(error) == f"{error.message} ({error.hint})"


def test_an_error_without_a_hint_is_its_message() -> None:
    assert str(UserError("no rows")) == "no rows"


def test_a_stop_is_not_an_error_that_libraries_catch() -> None:
    assert not issubclass(Interrupted, Exception)
