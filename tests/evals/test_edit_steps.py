"""The steps of an edit in reports: the table and the picture, of new results and of old ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.evals.test_report import Page, written
from unlearn.evals.report.edit_path import budget_drawn, caption, draw_edit_path, near
from unlearn.evals.report.edit_steps import EditStep, edit_steps, three, tried_scales
from unlearn.evals.report.tradeoff import Point
from unlearn.recipes.results import course
from unlearn.runs import RunFolder

FIRST = {
    "step": 1, "forget/nll": 1.5, "retain/kl": 0.04, "gain": 0.9, "kl_spent": 0.04,
    "kl_budget": 0.2, "alpha": 3e-4, "predicted_gain": 0.2, "predicted_kl": 0.0025,
    "damping": [1e-9, 2e-9, 3e-7], "evaluations": 4, "correction": 0.0, "corrected_kl": 0.0,
}  # fmt: skip
SECOND = FIRST | {
    "step": 2, "forget/nll": 2.25, "retain/kl": 0.13, "gain": 0.8, "kl_spent": 0.1,
    "correction": 0.3, "corrected_kl": 0.03, "evaluations": 2,
}  # fmt: skip
KFADE = {"edit": "kfade", "steps": 2, "seconds": 9.5, "curve": [FIRST, SECOND],
         "step_seconds": [6.25, 3.25]}  # fmt: skip
OLD = {
    "edit": "kfade",
    "steps": 2,
    "curve": [
        {key: one[key] for key in ("step", "forget/nll", "retain/kl", "alpha", "predicted_gain",
                                   "predicted_kl", "damping", "evaluations")}
        for one in (FIRST, SECOND)
    ],
}  # fmt: skip
REAPPLIED = {
    "edit": "reapply", "steps": 1, "scale": 0.5,
    "start": {"forget/nll": 0.5, "retain/kl": 0.0},
    "trials": [
        {"scale": 0.25, "forget/nll": 1.0, "retain/kl": 0.01},
        {"scale": 2.0, "forget/nll": 40.0, "retain/kl": 9.0},
        {"scale": 0.5, "forget/nll": 2.0, "retain/kl": 0.05},
        {"scale": 1.0, "forget/nll": math.nan, "retain/kl": 0.1},
    ],
    "curve": [{"step": 1, "forget/nll": 2.0, "retain/kl": 0.05, "alpha": 0.5, "evaluations": 4}],
}  # fmt: skip


def section(page: Page) -> str:
    """Give the words under the heading, up to the next one."""
    return page.text.partition("Steps of the edit")[2].partition("What these numbers")[0]


def test_a_row_per_step_says_what_was_predicted_and_measured(tmp_path: Path) -> None:
    """Step 2 begins at 2.25 - 0.8 = 1.45, after 0.04 - 0.03 was taken back; 0.1 of 0.2 is 50 %."""
    page, text = written(tmp_path, training=KFADE)
    for shown in (text, page.text):
        assert "Training" not in shown
        assert "trainer averaged" not in shown
    assert (
        "| 1 | 0.600 → 1.50 | 0.200 | 0.900 | – | 0.00250 | 0.0400 | 0.0400 | 20 % | 20 % | "
        "3.00e-4 | 2.00e-9 | 4 | 6.2 |\n"
        "| 2 | 1.45 → 2.25 | 0.200 | 0.800 | 0.0100 | 0.00250 | 0.100 | 0.130 | 50 % | 65 % | "
        "3.00e-4 | 2.00e-9 | 2 | 3.2 |\n"
    ) in text
    cells = "1.45 → 2.25 0.200 0.800 0.0100 0.00250 0.100 0.130 50 % 65 % 3.00e-4 2.00e-9 2 3.2"
    assert cells.replace(" ", "") in section(page).replace(" ", "")
    found = json.loads((tmp_path / "report.json").read_text())["edit"]
    assert [one["budget_share"] for one in found["steps"]] == pytest.approx([0.2, 0.65])
    assert found["steps"][1]["taken_back"] == pytest.approx(0.01)
    assert (tmp_path / "edit-path.svg").is_file()
    assert not (tmp_path / "curve.svg").exists()


def test_groups_of_columns_are_as_wide_as_what_stands_under_them(tmp_path: Path) -> None:
    for training, number in ((KFADE, 14), (OLD, 10), (REAPPLIED, 7)):
        page, _ = written(tmp_path, training=training)
        spans = [int(a["colspan"] or 0) for tag, a in page.tags if a.get("scope") == "colgroup"]
        found = json.loads((tmp_path / "report.json").read_text())["edit"]
        assert 1 + sum(spans) == len(found["columns"]) == number
        assert all(len(row) == number for row in found["rows"])
        assert sum(column["begins"] for column in found["columns"]) == 1 + len(spans)


def test_old_results_show_what_they_have(tmp_path: Path) -> None:
    """Without ``gain`` the loss before the first step is unknown; the KL was 0."""
    page, text = written(tmp_path, training=OLD)
    assert "| 1 | 1.50 | 0.200 | – | 0.00250 | 0.0400 | 0.0400 | 3.00e-4 | 2.00e-9 | 4 |" in text
    assert "| 2 | 1.50 → 2.25 | 0.200 | 0.750 | 0.00250 | 0.0900 | 0.130 |" in text
    assert "budget" not in section(page)
    assert "aken back" not in section(page)


def test_the_scales_of_an_update_are_listed(tmp_path: Path) -> None:
    page, text = written(tmp_path, training=REAPPLIED)
    assert "| 1 | 0.500 → 2.00 | 1.50 | 0.0500 | 0.0500 | 0.500 | 4 |" in text
    listed = text[text.index("| Scale |") :].splitlines()[2:7]
    assert listed[0] == "| 0 | 0.500 | 0.00 |  |"
    assert listed[2] == "| 0.5 | 2.00 | 0.0500 | taken |"
    assert listed[3] == "| 1 | – | 0.100 |  |"
    assert "Small points" in section(page)
    assert "curvature" not in section(page)
    assert "0.5, taken" in (tmp_path / "edit-path.svg").read_text()


def test_the_caption_says_on_which_rows_the_kl_is(tmp_path: Path) -> None:
    few = "too few retain rows to hold any out: KL is that of fitted rows"
    for changes, words in (
        ({"training": KFADE}, "held-out retain rows"),
        ({"training": KFADE, "warnings": [few]}, "which the curvature was fitted to"),
        ({"training": REAPPLIED}, "as nothing is fitted"),
    ):
        page, text = written(tmp_path, **changes)
        assert words in section(page)
        assert words in text


@pytest.mark.parametrize("curve", [[], [{"step": 1, "forget/nll": math.nan, "retain/kl": 0.1}]])
def test_an_edit_without_measured_steps(tmp_path: Path, curve: list[dict[str, Any]]) -> None:
    page, text = written(tmp_path, training={"edit": "mine", "steps": 1, "curve": curve})
    assert "No step was recorded." in section(page)
    assert "No step was recorded." in text
    assert not (tmp_path / "edit-path.svg").exists()


def test_numbers_that_are_none_leave_gaps() -> None:
    (one,) = edit_steps(
        {"curve": [FIRST | {"predicted_kl": None, "damping": [], "gain": math.nan}]}
    )
    assert (one.predicted_kl, one.damping, one.nll_from, one.gain) == (None, None, None, None)
    assert draw_edit_path([one])


def steps(budget: float | None, *kls: float) -> list[EditStep]:
    curve = [{"step": n, "forget/nll": float(n), "retain/kl": kl, "kl_budget": budget}
             for n, kl in enumerate(kls, start=1)]  # fmt: skip
    return edit_steps({"curve": curve, "start": {"forget/nll": 0.0}})


@pytest.mark.parametrize(
    ("budget", "drawn"), [(0.2, True), (0.6, True), (0.61, False), (None, False)]
)
def test_a_budget_far_above_the_path_is_named_but_not_drawn(
    budget: float | None, drawn: bool
) -> None:
    """Three times the largest KL is the most."""
    found = steps(budget, 0.1, 0.2)
    plot = draw_edit_path(found)
    assert plot
    assert budget_drawn(found) is drawn
    assert ("Line across" in caption(found)) is drawn
    assert ("above this picture" in plot.svg) is (budget is not None and not drawn)


def test_predicted_kl_has_a_panel_of_its_own_on_a_fitting_scale() -> None:
    alone = draw_edit_path(steps(0.2, 0.1))
    assert alone
    assert "KL of each step alone" not in alone.svg
    far, close = (
        draw_edit_path(edit_steps(KFADE | {"curve": [FIRST | {"predicted_kl": kl}]}))
        for kl in (2e-7, 0.02)
    )
    assert far
    assert close
    assert "predicted" in far.svg
    assert "1e-" in far.svg
    assert "e-" not in "".join(Page(close.svg).words)


def test_a_step_that_lowers_the_kl_is_drawn_where_the_scale_has_it() -> None:
    lower = SECOND | {"retain/kl": 0.02, "corrected_kl": 0.03, "predicted_kl": 1e-7}
    assert draw_edit_path(edit_steps({"curve": [FIRST, lower]}))
    assert draw_edit_path(edit_steps({"curve": [FIRST | {"retain/kl": 0.0, "predicted_kl": 0.0}]}))


def test_trials_that_went_too_far_are_not_drawn() -> None:
    assert tried_scales(REAPPLIED) == [Point(1.0, 0.01, "0.25"), Point(40.0, 9.0, "2")]
    assert near(edit_steps(REAPPLIED), tried_scales(REAPPLIED)) == [Point(1.0, 0.01, "0.25")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.00"), (0.2236, "0.224"), (482.7, "483"), (12345.6, "12,346"),
     (0.00042, "4.20e-4"), (-1.234e-12, "-1.23e-12"), (3.0, "3.00")],
)  # fmt: skip
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert three(value) == text


def test_seconds_of_steps_count_from_the_start_of_their_session(tmp_path: Path) -> None:
    """Killed after step 2 was told of and before it was kept: it is done again, for 4 s."""
    folder = RunFolder(tmp_path)
    edit = {"event": "stage", "stage": "edit"}
    events = [edit, (1, 2.0), (2, 5.0), edit, (2, 4.0), (3, 10.0)]
    lines = [
        one if isinstance(one, dict) else {"event": "step", "step": one[0], "seconds": one[1]}
        for one in events
    ]
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps({"time": float(place), **one}) + "\n" for place, one in enumerate(lines))
    )
    found = course(folder, edit=True)
    assert found["step_seconds"] == [2.0, 4.0, 6.0]
    assert found["steps"] == 3
    assert set(course(folder, edit=False)) == {"curve"}
