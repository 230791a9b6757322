"""The table over seeds and the curve of a sweep."""

import math
from typing import Any

import pytest

from tests.evals.test_compare import run
from unlearn.evals.report.seeds import cell_text, seed_table, to_markdown
from unlearn.evals.report.sweep_curve import (
    Measured,
    Place,
    curve_of,
    draw_sweep_curve,
    is_number,
    lines_of,
)


def measured(name: str, seed: int, **metrics: float | None) -> Any:
    """Give a run with TOFU's measures and a training time."""
    found = run(name, 0.1 * seed, 0.9, seed=seed)
    details = found.results["details"]["after"]
    for metric, value in metrics.items():
        details[metric] = {"value": value, "n": 400, "direction": "higher"}
    found.results["metrics"]["after"] = {k: d["value"] for k, d in details.items()}
    found.results["training"] = {"seconds": 10.0 * seed}
    return found


def test_mean_and_interval_of_each_measure() -> None:
    """Seeds 1, 2, 3: ps of 1e-1, 1e-2, 1e-3 have log10 p -1, -2, -3: -2 ± 2.484 (t interval)."""
    runs = [
        measured(f"s{seed}", seed, forget_quality=10.0**-seed, forget_truth_ratio=0.5,
                 extraction_strength=0.01 * seed, model_utility=0.8, retain_kl=0.02)
        for seed in (1, 2, 3)
    ]  # fmt: skip
    table = seed_table(runs)
    titles = [column["title"] for column in table["columns"]]
    assert titles == [
        "Forget probability", "Extraction strength", "Truth ratio", "Forget quality, log10 p",
        "Model utility", "Retain KL, nats", "Training, s",
    ]  # fmt: skip
    (row,) = table["rows"]
    assert row["n"] == 3
    quality = row["values"]["forget_quality_log10_p"]
    assert (quality["mean"], quality["low"]) == (
        pytest.approx(-2), pytest.approx(-2 - 2.484138, abs=1e-5)
    )  # fmt: skip
    assert cell_text(row, "seconds") == "20.0 ± 24.8"
    assert cell_text(row, "model_utility") == "0.800 ± 0.000"
    assert {one["name"] for one in table["references"]} == {"starting model", "retain model"}
    text = to_markdown(table, "unlearn sweep npo")
    lines = text.splitlines()
    assert lines[:3] == ["```sh", "unlearn sweep npo", "```"]
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {len(titles) + 3}


def test_a_measure_that_one_seed_lacks_has_no_mean() -> None:
    runs = [measured("a", 1, retain_kl=0.1), measured("b", 2, retain_kl=None)]
    (row,) = seed_table(runs)["rows"]
    assert row["values"]["retain_kl"] is None
    assert cell_text(row, "retain_kl") == "–"


def test_one_seed_has_no_interval() -> None:
    (row,) = seed_table([measured("a", 1)])["rows"]
    assert cell_text(row, "forget_Q_A_Prob") == "0.100"


RUNS = [
    Measured(line, x, {"m": value})
    for line, x, value in [
        ("a", 1.0, 0.5), ("a", 0.1, 0.2), ("a", 0.1, 0.4), ("b", 0.1, None), ("b", 1.0, math.nan),
    ]
]  # fmt: skip


def test_lines_have_the_mean_and_the_range_of_the_seeds() -> None:
    assert lines_of(RUNS, "m") == {
        "a": [Place(0.1, pytest.approx(0.3), 0.2, 0.4, 2), Place(1.0, 0.5, 0.5, 0.5, 1)]
    }
    assert lines_of(RUNS, "other") == {}


def test_the_drawing_names_its_axes_and_models() -> None:
    levels = {"before": {"m": 0.9}, "retain_model": {"m": 0.91}}
    curve = curve_of(RUNS, "data.select.fraction", ["m", "other"], levels)
    assert [panel["metric"] for panel in curve["panels"]] == ["m"]
    plot, png = draw_sweep_curve(curve, {"m": "A <measure>"}, {"m": "lower"})
    for text in ("A &lt;measure&gt; (lower is wanted)", "10 %", "100 %", "starting model"):
        assert text in plot.svg
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize(("text", "number"), [("1e-5", True), ("mink", False), ("nan", False)])
def test_what_can_be_an_axis(text: str, number: bool) -> None:
    assert is_number(text) == number
