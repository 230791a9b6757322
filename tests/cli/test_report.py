"""``unlearn report`` and ``unlearn compare`` on runs of the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def runs(run_npo: Any) -> list[str]:
    """Make three runs of two steps: two seeds of one recipe, and one with another beta."""
    changes = {"a": "seed=1", "b": "seed=2", "c": "terms.0.beta=0.5"}
    for out, change in changes.items():
        outcome = run_npo(change, out=f"runs/{out}")
        assert outcome.code == 0, outcome.err
    return [f"runs/{out}" for out in changes]


def test_report_and_compare(runs: list[str], unlearn: Any) -> None:
    table = unlearn("compare", *runs)
    assert table.code == 0, table.err
    for shown in ("● on the Pareto front", "npo, beta 0.1", "npo, beta 0.5", "starting model", "±"):
        assert shown in table.out
    assert not list(Path().glob("compare*"))

    compared = unlearn("compare", *runs, "--out", "cmp", "--json").json
    assert sorted((row["name"], row["n"]) for row in compared["rows"]) == [
        ("npo, beta 0.1", 2),
        ("npo, beta 0.5", 1),
    ]
    assert all(Path(file).is_file() for file in compared["files"].values())
    assert json.loads(Path("cmp/compare.json").read_text())["rows"] == compared["rows"]

    Path("runs/a/report.html").unlink()
    single = unlearn("report", "runs/a", "--json").json
    assert single["html"] == "runs/a/report.html"
    assert "Rows still given away" in Path(single["html"]).read_text()

    several = unlearn("report", *runs, "--out", "pages/all.html", "--json").json
    assert several["html"] == "pages/all.html"
    assert Path("pages/all.md").read_text().count("## npo · ") == 3
    assert "On the Pareto front" in several["headline"]
    assert "html     pages/all.html" in unlearn("report", *runs, "--out", "pages/all.html").out

    for command in (("report", "runs/a"), ("compare", *runs)):
        taken = unlearn(*command, "--out", "runs/b")
        assert taken.code == 2
        assert "'runs/b' is the folder of a run or an evaluation" in taken.err

    wrong = unlearn("compare", *runs, "--x", "forget_Q_A_Rouge")
    assert wrong.code == 2
    assert "did you mean" in wrong.err


def test_folders_that_cannot_be_reported_are_user_mistakes(tmp_path: Path, unlearn: Any) -> None:
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "recipe.yaml").write_text("method: npo\n")
    for command in ("report", "compare"):
        outcome = unlearn(command, stopped)
        assert outcome.code == 2
        assert f"hint: `unlearn resume {stopped}` continues it" in outcome.err
        assert "no folder" in unlearn(command, tmp_path / "nothing").err


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, unlearn: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    metrics = {"after": {"forget_Q_A_Prob": 0.1, "retain_Q_A_Prob": 0.9}}
    (run / "results.json").write_text(json.dumps({"metrics": metrics}))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        outcome = unlearn("report", run, "--out", place)
        assert outcome.code == 2, outcome.err
        assert "file" in outcome.err
    assert unlearn("report", run, "--out", tmp_path / "new" / "page.html").code == 0
    assert (tmp_path / "new" / "page.json").is_file()
