"""Thresholds: the same calls as p-values, rates by simulation, and refusal elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.detect.conformal import NotCalibrated, flagged, p_values
from unlearn.detect.thresholds import (
    Calibration,
    Conditions,
    at_fpr,
    at_tpr,
    calls,
    check_conditions,
    load,
    save,
    youden,
)
from unlearn.errors import UserError

values = st.integers(0, 12).map(float)
CONDITIONS = Conditions("a" * 64, "b" * 64, tokens=64)


def test_the_order_statistic_by_hand() -> None:
    """m = 19, 5 %: the ceil(20 · 0.95) = 19th smallest, the largest; m = 39: the 38th of 39.

    A fresh non-member exceeds the 38th smallest of 39 with probability (39 + 1 - 38) / 40 = 5 %.
    """
    assert at_fpr(range(19), 0.05).value == 18.0
    fitted = at_fpr(range(39), 0.05)
    assert fitted.value == 37.0
    assert fitted.fpr[0] == pytest.approx(0.05)
    assert fitted.fpr[1] < 0.02 < 0.1 < fitted.fpr[2]
    assert fitted.tpr is None


@given(st.lists(values, min_size=9, max_size=40), st.lists(values, min_size=1, max_size=10))
def test_calls_are_those_of_p_values(references: list[float], scores: list[float]) -> None:
    for fpr in (0.1, 0.2, 1 / 3):
        fitted = at_fpr(references, fpr)
        above = np.array(scores) > fitted.value
        assert above.tolist() == flagged(p_values(scores, references), fpr).tolist()


def test_the_range_of_the_rate_holds() -> None:
    """Uniform scores: the true rate of a threshold t is 1 - t; 95 % of ranges should hold it.

    All ranges are the same, as m is; it is t that varies. 2000 draws: standard error 0.5 points.
    """
    generator = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        fitted = at_fpr(generator.uniform(size=59), 0.1)
        held.append(fitted.fpr[1] <= 1 - fitted.value <= fitted.fpr[2])
    assert abs(np.mean(held) - 0.95) < 0.015


def test_a_true_positive_rate_is_kept_for_fresh_members() -> None:
    """n = 9, 90 %: the floor(10 · 0.1) = 1st smallest member is still called."""
    fitted = at_tpr(range(1, 10), 0.9, nonmembers=[0.0, 0.5, 1.0, 2.0])
    assert fitted.value < 1.0
    assert fitted.tpr is not None
    assert fitted.tpr[0] == 1.0
    assert fitted.fpr[0] == 0.5
    generator = np.random.default_rng(1)
    hits = [
        generator.normal() > at_tpr(generator.normal(size=19), 0.8, nonmembers=[0.0]).value
        for _ in range(3000)
    ]
    assert abs(np.mean(hits) - 0.8) < 0.025
    with pytest.raises(NotCalibrated, match="need at least 9 members"):
        at_tpr(range(8), 0.9, nonmembers=[0.0])


def test_youden_takes_the_largest_gap() -> None:
    """At 3: two of two members, one of three non-members, a gap of 2/3; at 4 it is 1/2."""
    fitted = youden([3.0, 4.0], [1.0, 2.0, 3.5])
    assert 2.0 < fitted.value < 3.0
    assert fitted.fpr[0] == pytest.approx(1 / 3)
    assert fitted.tpr is not None
    assert fitted.tpr[0] == 1.0


def calibration() -> Calibration:
    fitted = at_fpr(range(39), 0.05, members=[30.0, 40.0])
    return Calibration("minkpp", {"k": 0.2}, fitted, CONDITIONS)


def test_a_calibration_comes_back_as_it_was(tmp_path: Path) -> None:
    save(calibration(), tmp_path / "c.json")
    assert load(tmp_path / "c.json") == calibration()


@pytest.mark.parametrize("change", [{"model": "c"}, {"bos": "never"}, {"tokens": 32}])
def test_other_conditions_are_refused_by_name(change: dict[str, object]) -> None:
    check_conditions(calibration(), CONDITIONS, source="c.json")
    other = replace(CONDITIONS, **change)  # type: ignore[arg-type]
    with pytest.raises(NotCalibrated, match=next(iter(change))) as refused:
        check_conditions(calibration(), other, source="c.json")
    assert refused.value.exit_code == 4


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for content in ("", "[]", "{}", json.dumps({"format": "unlearn calibration 1", "score": "x"})):
        path.write_text(content)
        with pytest.raises(UserError, match="not a calibration"):
            load(path)
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "nowhere.json")


def test_calls_need_the_score_and_a_number() -> None:
    found = calls(calibration(), {"minkpp": [38.0, 37.0, float("nan")]})
    assert found.tolist() == [True, False, False]
    with pytest.raises(UserError, match="not computed"):
        calls(calibration(), {"loss": [1.0]})
