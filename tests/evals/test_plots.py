"""The plots: what they show by hand, that ids stay apart, and that labels do not collide."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.evals.report.ecdf import draw_ecdf, ks_distance, shares, usable_ratios
from unlearn.evals.report.labels import Box, place_labels
from unlearn.evals.report.tradeoff import choose_axes, draw_tradeoff, path_of

DIRECTIONS = {"forget_Q_A_Prob": "lower", "retain_Q_A_Prob": "higher", "model_utility": "higher"}


def both(forget: float, retain: float) -> dict[str, float]:
    return {"forget_Q_A_Prob": forget, "retain_Q_A_Prob": retain}


# truth ratios


def test_shares_count_values_at_or_below() -> None:
    found = shares([1.0, 2.0, 2.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert found.tolist() == [0.0, 0.25, 0.75, 0.75, 1.0]


def test_the_ks_distance_by_hand() -> None:
    """At 2 two thirds of [1, 2, 3] lie below and none of [2.5, 3.5, 4.5]: 2/3, again at 3."""
    found = ks_distance([1.0, 2.0, 3.0], [2.5, 3.5, 4.5])
    assert found.distance == pytest.approx(2 / 3)
    assert found.place == 2.0
    assert found.shares == pytest.approx((2 / 3, 0.0))
    # of the 20 ways to mix 3 and 3 values, 2^3 never have a gap above 1/3: p = 12/20
    assert found.p == pytest.approx(0.6)
    assert found.log10_p == pytest.approx(math.log10(0.6))


def test_equal_sets_are_not_told_apart() -> None:
    found = ks_distance([3.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert (found.distance, found.p) == (0.0, 1.0)


def test_the_distance_between_the_shared_models(shared: Path) -> None:
    """Forget quality of the target against the retain model: D = 0.53 and p = 9.7e-52."""

    def ratios(name: str) -> list[float]:
        path = shared / "parity" / f"tofu_eval_ou_tofu-tiny-{name}.json.gz"
        logs = json.loads(gzip.decompress(path.read_bytes()))
        stored = logs["forget_truth_ratio"]["value_by_index"]
        return [stored[str(row)]["score"] for row in range(len(stored))]

    found = ks_distance(ratios("target"), ratios("retain90"))
    assert found.distance == pytest.approx(0.53)
    assert found.log10_p == pytest.approx(-51.01, abs=0.01)
    assert found.n == (400, 400)


def test_ratios_that_are_none_are_left_out() -> None:
    given_ratios = {
        "after": [1.0, None, math.nan, math.inf, 2.0],
        "before": [],
        "retain_model": None,
    }
    assert usable_ratios(given_ratios) == {"after": [1.0, 2.0]}


@pytest.mark.parametrize("ratios", [[1.0, 1.0], [0.5], [1e-6, 100.0], [0.0, 3.0]])
def test_any_ratios_can_be_drawn(ratios: list[float]) -> None:
    plot = draw_ecdf({"after": ratios, "retain_model": [1.0, 2.0]}, {"after": "Model"})
    assert plot is not None
    assert ">Model<" in plot.svg
    assert ">KS distance " in plot.svg
    assert "mathdefault" not in plot.svg


def test_without_a_retain_model_no_distance_is_drawn() -> None:
    plot = draw_ecdf({"before": [1.0, 2.0], "after": [1.5]}, {})
    assert plot is not None
    assert "KS distance" not in plot.svg
    assert draw_ecdf({}, {}) is None


# the trade-off


def results(**changes: Any) -> dict[str, Any]:
    given_results = {
        "metrics": {
            "before": both(0.99, 0.98),
            "after": both(0.1, 0.9),
            "retain_model": both(0.01, 0.97),
        },
        "steps": [
            {"step": 20, "metrics": both(0.1, 0.9)},
            {"step": 10, "metrics": both(0.5, 0.95)},
        ],
        "selected": {"step": 10, "metric": "forget_Q_A_Prob", "value": 0.5, "constraints": {}},
    }
    return given_results | changes


def test_the_path_runs_from_the_start_over_the_steps_in_order() -> None:
    path = path_of(results(), DIRECTIONS)
    assert path is not None
    assert (path.x.metric, path.y.metric) == ("forget_Q_A_Prob", "retain_Q_A_Prob")
    assert [(p.label, p.x, p.y) for p in path.steps] == [("10", 0.5, 0.95), ("20", 0.1, 0.9)]
    assert path.start is not None
    assert (path.start.x, path.start.label) == (0.99, "start")
    assert path.selected == 0
    assert path.retain_model is not None
    svg = draw_tradeoff(path).svg
    for text in (
        "start",
        "10, selected",
        "20",
        "retain model",
        "forget_Q_A_Prob (lower is wanted →)",
    ):
        assert f">{text}<" in svg


def test_steps_without_numbers_are_left_out() -> None:
    steps = [
        {"step": 1, "metrics": both(0.9, 0.9)},
        {"step": 2, "metrics": both(math.nan, 0.9)},
        {"step": 3, "metrics": {"forget_Q_A_Prob": 0.1, "retain_Q_A_Prob": None}},
    ]
    path = path_of(results(steps=steps), DIRECTIONS)
    assert path is not None
    assert [p.label for p in path.steps] == ["1"]
    assert path.selected is None


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": []},
        {"steps": [{"step": 1, "metrics": {"retain_Q_A_Prob": 1.0}}]},
        {"metrics": {}, "steps": [{"step": 1, "metrics": both(0.5, 0.5)}]},
    ],
    ids=["no steps", "no forgetting", "one place"],
)
def test_without_a_way_there_is_no_path(changes: dict[str, Any]) -> None:
    assert path_of(results(**changes), DIRECTIONS) is None


def test_the_first_declared_metric_that_everybody_has_is_an_axis() -> None:
    names = {"forget_Q_A_Prob", "retain_Q_A_Prob", "model_utility"}
    axes = choose_axes(names.__contains__, DIRECTIONS)
    assert axes is not None
    assert [axis.metric for axis in axes] == ["forget_Q_A_Prob", "model_utility"]
    assert choose_axes({"model_utility"}.__contains__, DIRECTIONS) is None


# labels and ids


POINTS = st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), min_size=1, max_size=12)


@given(POINTS)
def test_no_label_covers_another_or_leaves_the_frame(points: list[tuple[float, float]]) -> None:
    frame = Box(0, 0, 300, 200)
    labels = [f"label {number}" for number in range(len(points))]
    boxes = []
    for (x, y), label, offset in zip(
        points, labels, place_labels(points, labels, [], frame), strict=True
    ):
        if offset is None:
            continue
        wide, high = 0.6 * 9 * len(label), 1.15 * 9
        left = x + offset[0] - (0 if offset[0] > 0 else wide if offset[0] < 0 else wide / 2)
        boxes.append(Box(left, y + offset[1] - high / 2, left + wide, y + offset[1] + high / 2))
    for place, box in enumerate(boxes):
        assert box.within(frame)
        assert not any(box.meets(other) for other in boxes[:place])
        assert not any(box.left < x < box.right and box.bottom < y < box.top for x, y in points)


def test_a_label_alone_has_room() -> None:
    assert place_labels([(100.0, 100.0)], ["start"], [], Box(0, 0, 300, 200)) == [(6, 8)]
    assert place_labels([(5.0, 5.0)], ["start"], [], Box(0, 0, 8, 8)) == [None]


def test_ids_of_two_drawings_on_a_page_stay_apart() -> None:
    path = path_of(results(), DIRECTIONS)
    assert path is not None
    plot = draw_tradeoff(path)
    one, two = plot.themed("run1-"), plot.themed("run2-")
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in (one, two)]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    for svg, own in zip((one, two), ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) == set(own)


def test_a_themed_drawing_has_the_colours_of_the_page_and_a_file_has_its_own() -> None:
    path = path_of(results(), DIRECTIONS)
    assert path is not None
    plot = draw_tradeoff(path)
    assert not re.search(r"#[0-9a-f]{6}", plot.themed())
    assert "var(--line-0)" in plot.themed()
    assert "var(--" not in plot.standalone()
    assert 'fill="#ffffff"' in plot.standalone()
