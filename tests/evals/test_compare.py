"""The leaderboard: the front, seeds as one row, and what may be compared at all."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.errors import UserError
from unlearn.evals.report.compare import compare, draw_comparison, t_interval
from unlearn.evals.report.folders import Found, open_folder, open_folders
from unlearn.evals.report.leaderboard import write_comparison, write_reports
from unlearn.evals.report.pareto import pareto_front

NASTY = '<script>alert("x")</script> ![i](https://evil.example/a.png) | `c` \u202e'


def results(forget: float | None, retain: float, **changes: Any) -> dict[str, Any]:
    def details(forget: float | None, retain: float) -> dict[str, Any]:
        return {
            "forget_Q_A_Prob": {"value": forget, "n": 400, "direction": "lower"},
            "retain_Q_A_Prob": {"value": retain, "n": 400, "direction": "higher"},
            "mia_loss": {"value": 0.5, "n": 400, "direction": "none"},
        }

    found = {
        "before": details(0.99, 0.98),
        "after": details(forget, retain),
        "retain_model": details(0.01, 0.97),
    }
    return {
        "status": "complete",
        "method": "npo",
        "metrics": {w: {k: d["value"] for k, d in m.items()} for w, m in found.items()},
        "details": found,
        "examples": [],
        "training": {},
        "provenance": {
            "model_sha256": "m1",
            "template": "t1",
            "forget": {"source": "data#forget10", "sha256": "f" * 64},
            "retain": {"source": "data#retain", "sha256": "r" * 64},
        },
    } | changes


def run(name: str, forget: float | None, retain: float, seed: int = 1, **recipe: Any) -> Found:
    settings = {"method": "npo", "training": {"learning_rate": "1e-5"}, "seed": str(seed),
                "out": f"runs/{name}"} | recipe  # fmt: skip
    method = settings["method"]
    return Found(Path(f"runs/{name}"), results(forget, retain, method=method), settings)


def changed(found: Found, **provenance: Any) -> Found:
    recorded = found.results["provenance"] | provenance
    return Found(found.folder, found.results | {"provenance": recorded}, found.recipe)


# the front


POINT = st.tuples(st.floats(0, 1) | st.just(math.nan), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


def test_the_front_by_hand() -> None:
    """Less x and more y is better: (0.1, 0.5) and (0.3, 0.9) beat the others but not each other."""
    points = [(0.1, 0.5), (0.3, 0.9), (0.3, 0.4), (0.5, 0.9), (math.nan, 1.0)]
    assert pareto_front(points, ["lower", "higher"]) == [True, True, False, False, False]


@given(st.lists(POINT, max_size=12), st.tuples(*[st.sampled_from(["lower", "higher"])] * 2))
def test_exactly_what_nothing_dominates_is_on_the_front(
    points: list[tuple[float, float]], directions: tuple[str, str]
) -> None:
    def better(a: float, b: float, direction: str) -> bool:
        return a < b if direction == "lower" else a > b

    def dominated(point: tuple[float, float]) -> bool:
        return any(
            not any(better(p, o, d) for p, o, d in zip(point, other, directions, strict=True))
            and any(better(o, p, d) for p, o, d in zip(point, other, directions, strict=True))
            for other in points
            if not math.isnan(other[0])
        )

    front = pareto_front(points, directions)
    for point, on_front in zip(points, front, strict=True):
        assert on_front == (not math.isnan(point[0]) and not dominated(point))
    if any(not math.isnan(x) for x, _ in points):
        assert any(front)


def test_equal_points_are_both_on_the_front() -> None:
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)], ["higher", "higher"]) == [True, True]
    assert pareto_front([], ["higher", "higher"]) == []


# seeds


def test_the_t_interval_by_hand() -> None:
    """1, 2, 3: deviation 1, error 1/sqrt(3), t(0.975, 2) = 4.302653: 2 ± 2.484138."""
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert found.high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_one_seed_has_no_interval() -> None:
    found = t_interval([0.5])
    assert (found.mean, found.low, found.high, found.n) == (0.5, None, None, 1)


def test_seeds_of_one_recipe_are_one_row() -> None:
    runs = [run("a", 0.1, 0.9, 1), run("b", 0.3, 0.9, 2), run("c", 0.5, 0.95, method="rmu")]
    rows = compare(runs)["rows"]
    assert [(row["name"], row["n"], row["front"]) for row in rows] == [
        ("npo", 2, True),
        ("rmu", 1, True),
    ]
    value = rows[0]["values"]["forget_Q_A_Prob"]
    # deviation 0.141421, error 0.1, t(0.975, 1) = 12.7062: 0.2 ± 1.27062
    assert value == pytest.approx({"mean": 0.2, "low": -1.07062, "high": 1.47062, "n": 2})
    assert rows[0]["seeds"] == [1, 2]


def test_recipes_of_one_method_are_named_by_what_differs() -> None:
    runs = [
        run("a", 0.1, 0.9),
        run("b", 0.2, 0.8, training={"learning_rate": "2e-5"}),
        run("c", 0.3, 0.7, method="rmu"),
    ]
    names = [row["name"] for row in compare(runs)["rows"]]
    assert names == ["npo, learning_rate 1e-5", "npo, learning_rate 2e-5", "rmu"]


def test_where_model_and_data_lay_does_not_matter_only_what_they_are() -> None:
    one = run("a", 0.1, 0.9, 1, model={"path": "/a/../m"}, data={"forget": "/x/f.jsonl"})
    two = run("b", 0.2, 0.9, 2, model={"path": "/m"}, data={"forget": "/y/f.jsonl"},
              evals={"every": "10", "tofu": "null"})  # fmt: skip
    assert len(compare([one, two])["rows"]) == 1
    assert len(compare([one, changed(two, model_sha256="m2")])["rows"]) == 2


def test_a_seed_counted_twice_is_named() -> None:
    found = compare([run("a", 0.1, 0.9, 7), run("b", 0.1, 0.9, 7)])
    assert found["warnings"] == [
        "a and b have the same recipe and seed 7: they count as several seeds, so the interval is "
        "too narrow."
    ]


def test_a_seed_without_a_number_leaves_the_row_without_one() -> None:
    found = compare([run("a", None, 0.9, 1), run("b", 0.1, 0.9, 2), run("c", 0.5, 0.5, method="x")])
    assert [(row["name"], row["front"]) for row in found["rows"]] == [("x", True), ("npo", False)]
    assert found["rows"][1]["values"]["forget_Q_A_Prob"] is None


def test_starting_and_retain_model_are_reference_rows() -> None:
    found = compare([run("a", 0.1, 0.9), run("b", 0.2, 0.9, method="rmu")])
    assert [(row["who"], row["name"], row["values"]["forget_Q_A_Prob"]["mean"])
            for row in found["references"]] == [
        ("before", "starting model", 0.99), ("retain_model", "retain model", 0.01)
    ]  # fmt: skip
    plot = draw_comparison(found)
    assert plot is not None
    assert ">retain model<" in plot.svg
    assert ">starting model, beyond at (0.990, 0.980)<" in plot.svg


# what may be compared


def test_other_forget_sets_are_refused() -> None:
    other = changed(run("b", 0.1, 0.9), forget={"source": "data#forget05", "sha256": "e" * 64})
    with pytest.raises(UserError, match="different forget sets") as error:
        compare([run("a", 0.1, 0.9), other])
    assert "a: data#forget10, sha256 ffffffffffff…; b: data#forget05" in error.value.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_sha256": "m2"}, "start from different models"),
        ({"retain": {"sha256": "q"}}, "different retain sets"),
        ({"template": "t2"}, "different prompts"),
        ({"forget": {}}, "cannot be checked"),
    ],
)
def test_other_conditions_are_warned_of(change: dict[str, Any], said: str) -> None:
    runs = [run("a", 0.1, 0.9), changed(run("b", 0.1, 0.9, method="rmu"), **change)]
    assert [said in warning for warning in compare(runs)["warnings"]] == [True]
    assert compare([runs[0]])["warnings"] == []


def test_other_numbers_of_rows_and_unfinished_runs_are_warned_of() -> None:
    other = run("b", 0.2, 0.8, method="rmu")
    other.results["status"] = "interrupted"
    other.results["details"]["after"]["forget_Q_A_Prob"]["n"] = 40
    assert compare([run("a", 0.1, 0.9), other])["warnings"] == [
        "forget_Q_A_Prob was measured on different numbers of rows (40, 400).",
        "b is not complete (status: interrupted).",
    ]


def test_metrics_can_be_chosen_and_mistakes_are_named() -> None:
    runs = [run("a", 0.1, 0.9)]
    found = compare(runs, x="retain_Q_A_Prob", y="forget_Q_A_Prob")
    assert (found["x"]["metric"], found["y"]["direction"]) == ("retain_Q_A_Prob", "lower")
    with pytest.raises(UserError, match="did you mean 'forget_Q_A_Prob'"):
        compare(runs, x="forget_q_a_prob ")
    with pytest.raises(UserError, match="nothing is wanted of 'mia_loss'"):
        compare(runs, x="mia_loss")


def test_runs_without_a_common_metric_are_refused() -> None:
    other = run("b", 0.1, 0.9)
    for part in ("metrics", "details"):
        del other.results[part]["after"]["retain_Q_A_Prob"]
    with pytest.raises(UserError, match="no metrics of forgetting and of utility in common"):
        compare([run("a", 0.1, 0.9), other])


# folders


def stored(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results(0.1, 0.9, **changes)))
    return folder


def test_a_folder_given_twice_counts_once(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a")
    found = open_folders([folder, tmp_path / "a" / ".." / "a", folder / "results.json"])
    assert [one.name for one in found] == ["a"]


def test_recipes_are_read_as_text(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a")
    (folder / "recipe.yaml").write_text("terms: [{objective: npo, on: forget}]\nseed: 3\n")
    assert open_folder(folder).recipe == {
        "terms": [{"objective": "npo", "on": "forget"}],
        "seed": "3",
    }


def test_stored_records_give_the_leakage_that_results_lack(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a")
    (folder / "evals").mkdir()
    records = [
        {"split": "forget", "rouge_l_recall": 1.0},
        {"split": "forget", "rouge_l_recall": 0.1},
    ]
    (folder / "evals" / "after.json").write_text(json.dumps({"records": records}))
    (folder / "records_retain_model.jsonl").write_text(json.dumps(records[1]) + "\n")
    found = open_folder(folder).results["leakage"]
    assert {who: (counts["leaked"], counts["n"]) for who, counts in found.items()} == {
        "after": (1, 2),
        "retain_model": (0, 1),
    }


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ({}, "no folder", "give the --out folder"),
        ({"recipe.yaml": "a: 1"}, "is not complete", "unlearn resume"),
        ({"x/results.json": "{}"}, "holds no results.json", "give the runs in it"),
        ({"other": ""}, "holds no results.json", "finished run or evaluation"),
        ({"results.json": "{"}, "cannot be read", "restore it"),
        ({"results.json": "[]"}, "no metrics", "changed by hand"),
        (
            {"results.json": '{"metrics": {}}', "recipe.yaml": "a: ["},
            "cannot be read",
            "restore it",
        ),
    ],
)
def test_a_folder_without_results_is_named(
    tmp_path: Path, files: dict[str, str], message: str, hint: str
) -> None:
    folder = tmp_path / "run"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_folder(folder)
    assert hint in error.value.hint


# pages


def test_the_three_files_say_the_same(tmp_path: Path) -> None:
    runs = [run("a", 0.1, 0.9, 1), run("b", 0.3, 0.9, 2), run("c", 0.5, 0.95, method="rmu")]
    write_comparison(tmp_path, compare(runs))
    page, text = (tmp_path / "compare.html").read_text(), (tmp_path / "compare.md").read_text()
    stored_comparison = json.loads((tmp_path / "compare.json").read_text())
    for shown in ("-1.071 to 1.471", "0.950", "starting model".capitalize(), "runs/a"):
        assert shown in page
        assert shown in text
    assert stored_comparison["rows"][0]["name"] == "npo"
    assert "| 1. npo | ● yes | 2 | 0.200 (-1.071 to 1.471) |" in text
    assert "![Forgetting and utility" in text
    assert (tmp_path / "pareto-front.svg").read_text().startswith("<svg")


def test_names_of_runs_are_text(tmp_path: Path) -> None:
    write_comparison(tmp_path, compare([run(NASTY, 0.1, 0.9, method=NASTY)]))
    assert "<script" not in (tmp_path / "compare.html").read_text()
    text = (tmp_path / "compare.md").read_text()
    assert "<script" not in text.replace("\\<script", "")
    assert "![i]" not in text.replace("\\!\\[i\\]", "")


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    runs = [run("a", 0.1, 0.9), run("b", 0.5, 0.95, method="rmu")]
    content = write_reports(tmp_path, runs)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert page.index("Leaderboard") < page.index("npo · a") < page.index("rmu · b")
    assert page.count('<details class="run">') == 2
    assert text.index("## Leaderboard") < text.index("## npo · a") < text.index("### Numbers")
    assert [one["name"] for one in content["runs"]] == ["npo · a", "rmu · b"]
    assert json.loads((tmp_path / "report.json").read_text()) == content


def test_runs_that_cannot_be_ranked_are_shown_unranked(tmp_path: Path) -> None:
    other = changed(run("b", 0.1, 0.9), forget={"source": "other", "sha256": "e"})
    content = write_reports(tmp_path, [run("a", 0.1, 0.9), other])
    assert content["leaderboard"] is None
    for name in ("report.html", "report.md"):
        shown = (tmp_path / name).read_text()
        assert "The runs have different forget sets and cannot be ranked" in shown
        assert "npo · b" in shown
