"""Sweeps through the command line: what is run, skipped, continued and told."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import settings, write_rows
from tests.cli.test_bad_input import refused
from unlearn.errors import RunFailed


@pytest.fixture
def sweep(world: Path, unlearn: Any) -> Any:
    """Give a function that sweeps two-step runs of the tiny model."""

    def call(*options: object, recipes: tuple[str, ...] = ("npo",), out: str = "all") -> Any:
        given = ("--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl")
        place = ("--out", out) if out else ()
        return unlearn("sweep", *recipes, *given, *place, *settings(), *options)

    return call


def outcomes(content: Any) -> dict[str, str]:
    return {cell["name"]: cell["outcome"] for cell in content["cells"]}


def touched(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("results.json")}


def test_cells_are_recipes_times_settings_times_seeds(sweep):
    grid = ("--grid", "training.learning_rate=1e-5,2e-5", "--grid", "gamma=0.5,1")
    outcome = sweep(*grid, "--seeds", "0,7", "--print", "--json", recipes=("npo", "grad_diff"))
    assert outcome.code == 0, outcome.err
    names = [cell["name"] for cell in outcome.json["cells"]]
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 2
    assert names[0] == "npo_learning_rate=1e-5_gamma=0.5_seed=0"
    assert names[-1] == "grad_diff_learning_rate=2e-5_gamma=1_seed=7"
    assert not Path("all").exists()


def test_a_drawn_part_of_the_grid_is_always_the_same(sweep):
    grid = ("--grid", "training.learning_rate=1e-5,2e-5,3e-5,4e-5", "--grid", "beta=0.1,0.2,0.3")
    found = [sweep(*grid, "--random", "5", "--print", "--json").json["cells"] for _ in range(2)]
    assert found[0] == found[1]
    assert len({cell["name"] for cell in found[0]}) == 5


def test_values_with_commas_in_brackets(sweep):
    """A list is one value: two values, not four."""
    grid = ("--grid", "training.trainable=[q_proj,k_proj],[v_proj]", "--print", "--json")
    cells = sweep(*grid).json["cells"]
    assert [cell["settings"] for cell in cells] == [
        {"training.trainable": "[q_proj,k_proj]"}, {"training.trainable": "[v_proj]"}
    ]  # fmt: skip


def test_a_table_over_seeds_for_several_methods(sweep):
    recipes = ("npo", "grad_diff")
    options = ("--seeds", "0,1", "--set", "evals.retain_kl=true")
    outcome = sweep(*options, "--markdown", "table.md", "--json", recipes=recipes)
    assert outcome.code == 0, outcome.err
    content = outcome.json
    assert content == json.loads(Path("all/sweep.json").read_text()) | {"files": content["files"]}
    assert set(outcomes(content).values()) == {"complete"}
    rows = {row["name"]: row for row in content["table"]["rows"]}
    assert set(rows) == set(recipes)
    one, two = (
        json.loads(Path(f"all/npo_seed={seed}/results.json").read_text()) for seed in (0, 1)
    )
    kls = [run["metrics"]["after"]["retain_kl"] for run in (one, two)]
    found = rows["npo"]["values"]["retain_kl"]
    assert found["mean"] == pytest.approx(sum(kls) / 2)
    assert found["n"] == 2
    # two values: t(0.975, 1) = 12.7062 standard errors, each half of their distance
    assert found["high"] - found["mean"] == pytest.approx(
        12.7062 * abs(kls[0] - kls[1]) / 2, rel=1e-4
    )
    assert kls[0] > 0
    assert one["metrics"]["before"]["retain_kl"] == 0
    assert rows["npo"]["values"]["seconds"]["n"] == 2
    text = Path("table.md").read_text()
    assert text.startswith("```sh\nunlearn sweep npo grad_diff --model model")
    assert text.count("\n| ") == 1 + 2 + 1  # heading, two methods, the starting model
    for name in ("compare.html", "compare.md", "pareto-front.svg"):
        assert (Path("all") / name).is_file()


def test_complete_runs_are_skipped_and_new_seeds_added(sweep):
    assert sweep("--seeds", "0").code == 0
    before = touched("all")
    again = sweep("--seeds", "0,1", "--json")
    assert again.code == 0, again.err
    assert outcomes(again.json) == {"npo_seed=0": "skipped", "npo_seed=1": "complete"}
    assert again.json["table"]["rows"][0]["n"] == 2
    assert before.items() <= touched("all").items()


def test_a_stopped_sweep_goes_on(sweep, monkeypatch):
    """Stopped in the second of three runs: the first is kept, the second resumed."""
    stops = iter([signal.SIGINT])

    @contextlib.contextmanager
    def listening(**_: Any) -> Any:
        cell = []

        def emit(event: dict[str, Any]) -> None:
            cell.append(event.get("name")) if event.get("stage") == "cell" else None
            if event["event"] == "step" and cell[-1] == "2/3 npo_seed=1":
                for number in stops:
                    os.kill(os.getpid(), number)

        yield emit

    monkeypatch.setattr("unlearn.cli.progress.listening", listening)
    stopped = sweep("--seeds", "0,1,2", "--json")
    assert stopped.code == 75
    assert "1 of 3 runs are complete" in stopped.err
    assert "the same command goes on" in stopped.err
    states = {
        c["name"]: c["state"] for c in sweep("--seeds", "0,1,2", "--print", "--json").json["cells"]
    }
    assert states == {"npo_seed=0": "complete", "npo_seed=1": "begun", "npo_seed=2": "new"}
    whole = sweep("--seeds", "1", out="whole")
    gone_on = sweep("--seeds", "0,1,2", "--json")
    assert (whole.code, gone_on.code) == (0, 0), gone_on.err
    assert gone_on.json["table"]["rows"][0]["n"] == 3
    resumed, theirs = (
        json.loads(Path(f"{out}/npo_seed=1/results.json").read_text()) for out in ("all", "whole")
    )
    assert resumed["metrics"] == theirs["metrics"]


def test_a_run_that_fails_does_not_stop_the_others(sweep, monkeypatch):
    from unlearn.recipes import run

    train = run.train

    def fragile(prepared: Any, *arguments: Any, **named: Any) -> Any:
        if prepared.recipe.seed == 1:
            raise RunFailed("gradients are not finite")
        if prepared.recipe.seed == 2:
            raise ValueError("a bug")
        return train(prepared, *arguments, **named)

    monkeypatch.setattr(run, "train", fragile)
    outcome = sweep("--seeds", "1,2,3", "--json")
    assert outcome.code == 1
    content = outcome.json
    assert outcomes(content) == {"npo_seed=1": "failed", "npo_seed=2": "failed",
                                 "npo_seed=3": "complete"}  # fmt: skip
    assert content["error"]["exit_code"] == 1
    for words in (
        "2 of 3 runs failed",
        "npo_seed=1: gradients are not finite",
        "ValueError: a bug",
    ):
        assert words in content["error"]["message"]
        assert words in outcome.err
    assert "ValueError" in Path("all/npo_seed=2/error.log").read_text()
    assert content["table"]["rows"][0]["n"] == 1
    monkeypatch.setattr(run, "train", train)
    assert sweep("--seeds", "1,2,3").code == 0


def test_other_settings_in_the_same_folder_are_refused(sweep):
    assert sweep("--seeds", "0").code == 0
    outcome = sweep("--seeds", "0,1", "--set", "training.max_steps=1", "--json")
    refused(outcome, "'all/npo_seed=0' holds a run with another training.max_steps")
    assert not Path("all/npo_seed=1").exists()


BAD = [
    (("--grid", "beta"), "cannot read --grid beta"),
    (("--grid", "beta=0.1,"), "cannot read --grid beta=0.1,"),
    (("--grid", "beta=0.1", "--grid", "beta=0.2"), "--grid beta is given twice"),
    (("--grid", "beta=0.1,0.1"), "beta: 0.1 is given twice"),
    (("--seeds", "a"), "cannot read --seeds a"),
    (("--seeds", "0,0"), "seeds: 0 is given twice"),
    (("--seeds", "0", "--grid", "seed=1"), "give one of them"),
    (("--curve", "beta"), "unknown setting for --curve"),
    (("--grid", "data.select.by=random", "--set", "data.select.fraction=0.5", "--curve",
      "data.select.by"), "a curve needs numbers"),
    (("--forget", "none.jsonl"), "none.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), BAD, ids=[words for _, words in BAD])
def test_mistakes_are_told_before_anything_starts(sweep, options, words):
    refused(sweep(*options, "--json"), words)
    assert not Path("all").exists()


def test_all_mistakes_of_all_cells_at_once(sweep):
    grid = ("--grid", "training.learning_rate=1e-5,fast", "--grid", "beta=0.1")
    outcome = sweep(*grid, "--seeds", "0,1", "--json", recipes=("npo", "grad_diff", "npoo"))
    refused(
        outcome,
        "nothing was started",
        "npo: training.learning_rate: 'fast' given",
        "(in npo_learning_rate=fast_beta=0.1_seed=0 and 1 more)",
        "grad_diff: --set beta=0.1: unknown key",
        "unknown method or recipe 'npoo'; did you mean 'npo'?",
    )
    assert not Path("all").exists()


def test_a_folder_that_is_no_sweep_is_left_alone(sweep):
    Path("all").mkdir()
    Path("all/diary.txt").write_text("mine")
    refused(sweep("--json"), "holds something that is no sweep")
    refused(sweep("--json", out=""), "--out is missing")


def test_a_sweep_as_a_file(world, unlearn):
    Path("sweep.yaml").write_text(
        "recipes: [npo]\nseeds: [0, 1]\ngrid: {training.learning_rate: [1.0e-5, 2.0e-5]}\n"
        "set: [training.max_steps=1, evals.generate=false]\nout: all\n"
        "base:\n  model: {path: model}\n  data: {forget: forget.jsonl, retain: retain.jsonl}\n"
    )
    cells = unlearn("sweep", "sweep.yaml", "--print", "--json").json["cells"]
    assert [cell["seed"] for cell in cells] == [0, 1, 0, 1]
    assert cells[2]["settings"] == {"training.learning_rate": "2.0e-05"}
    Path("sweep.yaml").write_text("recipes: [npo]\nseedz: [0]\nout: all\n")
    refused(unlearn("sweep", "sweep.yaml", "--json"), "seedz: unknown key; one of recipes, grid")


def test_a_sweep_from_python(world):
    text = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    base = {
        "model": {"path": "model"},
        "data": {"forget": "forget.jsonl", "retain": "retain.jsonl"},
        "training": {"max_steps": 1},
        "evals": {"generate": False, "max_rows": 2},
    }
    names: dict[str, Any] = {}
    exec(code.replace("{...}", repr(base)), names)
    assert names["content"]["table"]["rows"][0]["n"] == 2
    assert Path("runs/sweep/compare.md").is_file()


def test_the_coreset_curve(sweep):
    """Two selectors, two parts, two seeds: two lines of two places with both seeds in each."""
    grid = ("--grid", "data.select.by=random,mink", "--grid", "data.select.fraction=0.25,1")
    outcome = sweep(*grid, "--seeds", "0,1", "--set", "training.max_steps=-1", "--set",
                    "training.num_train_epochs=1", "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    curve = json.loads(Path("all/curve.json").read_text())
    assert curve["setting"] == "data.select.fraction"
    panel = curve["panels"][0]
    assert panel["metric"] == "forget_Q_A_Prob"
    assert set(panel["lines"]) == {"random", "mink"}
    for places in panel["lines"].values():
        assert [(place["x"], place["n"]) for place in places] == [(0.25, 2), (1.0, 2)]
        assert all(place["low"] <= place["mean"] <= place["high"] for place in places)
    # all rows are all rows, whoever chose them
    assert panel["lines"]["random"][1] == panel["lines"]["mink"][1]
    assert Path("all/curve.png").read_bytes().startswith(b"\x89PNG")
    assert Path("all/curve.svg").read_text().startswith("<svg")
    assert len(outcome.json["table"]["rows"]) == 4


@pytest.mark.slow
def test_several_at_a_time_give_the_same(sweep):
    alone = sweep("--seeds", "0,1", "--json", out="alone").json
    together = sweep("--seeds", "0,1", "--jobs", "2", "--json", out="together")
    assert together.code == 0, together.err
    rows = zip(alone["table"]["rows"], together.json["table"]["rows"], strict=True)
    for ours, theirs in rows:
        ours["values"].pop("seconds"), theirs["values"].pop("seconds")
        assert ours["values"] == theirs["values"]
    assert "measuring after" in Path("together/logs/npo_seed=0.log").read_text()
    assert "unlearn" in json.loads(Path("together/npo_seed=0/manifest.json").read_text())["command"]


@pytest.mark.slow
def test_a_stop_is_passed_on_to_the_processes(world):
    """Both runs under way save their last step; the sweep ends as a stopped run does."""
    command = [sys.executable, "-m", "unlearn.cli", "sweep", "npo", "--model", "model",
               "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "all",
               "--jobs", "2", "--seeds", "0,1", *settings("training.max_steps=100000")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    events = [Path(f"all/npo_seed={seed}/events.jsonl") for seed in (0, 1)]
    while not all(path.exists() and '"step"' in path.read_text() for path in events):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "interrupted: 0 of 2 runs are complete" in told
    assert "the same command goes on" in told
    for path in events:
        assert any((path.parent / "checkpoints").glob("checkpoint-*/complete.json"))


RATES = ("--grid", "training.learning_rate=1e-4,1e-3", "--seeds", "0,1")


@pytest.fixture
def chats(world: Path) -> Path:
    """Write pairs and rows beside the tiny model."""
    pairs = [
        {"question": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"Not {n}, but boats."}
        for n in range(6)
    ]
    write_rows(world / "pairs.jsonl", pairs)
    return world


def test_pairs_and_texts_reach_every_cell(chats, unlearn):
    given = ("--model", "model", "--pairs", "pairs.jsonl", "--text", "retain.jsonl", "--out", "all")
    outcome = unlearn("sweep", "redi", *given, *RATES, "--print", "--json")
    assert outcome.code == 0, outcome.err
    assert len(outcome.json["cells"]) == 4


def test_post_training_is_shown_by_what_it_changes(chats, unlearn):
    """A table over seeds, each value the mean of two runs' own; no word of a leaderboard."""
    given = ("--model", "model", "--pairs", "pairs.jsonl", "--out", "all")
    more = settings("first=null", "data.heldout=forget.jsonl")
    outcome = unlearn("sweep", "redi", *given, *RATES, *more, "--markdown", "t.md",
                      "--curve", "training.learning_rate", "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    content = outcome.json
    shown = [column["metric"] for column in content["table"]["columns"]]
    assert shown == [
        "heldout_loss", "pairs_accuracy", "pairs_margin", "chosen_logp", "rejected_logp",
        "seconds",
    ]  # fmt: skip
    first = content["table"]["rows"][0]
    runs = [json.loads(Path(f"all/{name}/results.json").read_text()) for name in first["runs"]]
    for name in shown[:-1]:
        values = [run["metrics"]["after"][name] for run in runs]
        assert first["values"][name]["mean"] == pytest.approx(sum(values) / 2)
    start = content["table"]["references"][0]
    assert start["values"]["chosen_logp"]["mean"] == pytest.approx(
        runs[0]["metrics"]["before"]["chosen_logp"]
    )
    assert content["not_ranked"] == ""
    assert "leaderboard" not in content["files"]
    assert "| Seeds | Held-out loss ↓ | Pairs told apart ↑ |" in Path("t.md").read_text()
    assert Path("all/curve.png").is_file()
    people = unlearn("sweep", "redi", *given, *RATES, *more)
    assert "leaderboard" not in people.out
    assert "held-out" in people.out
    assert "nats per token" in " ".join(people.out.split())
