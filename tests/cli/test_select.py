"""A part of the forget set through the command line: manifests, runs, plans, and bad input."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_bad_input import refused
from tests.cli.test_resume import stop_at  # noqa: F401 - a fixture

SHORT = ("training.max_steps=-1", "training.num_train_epochs=2")
"""Twelve rows in batches of four: three steps an epoch, six in all."""


@pytest.fixture
def choose(world: Path, unlearn: Any) -> Any:
    """Give a function that runs ``unlearn data select`` on the tiny model."""

    def call(by: str, *options: object, out: str = "part.json", fraction: object = 0.25) -> Any:
        share = () if fraction is None else ("--fraction", fraction)
        loss = ("--recipe", "npo") if by in ("grand", "worst") else ()
        given = ("--model", "model", "--retain", "retain.jsonl", "--by", by, "--out", out)
        return unlearn("data", "select", "forget.jsonl", *given, *share, *loss, *options, "--json")

    return call


def weights(run: str) -> dict[str, torch.Tensor]:
    return dict(load_file(f"{run}/model/model.safetensors"))


@pytest.mark.parametrize("by", ["random", "grand", "moderate", "mink", "keyword", "worst"])
def test_every_selector_writes_the_same_manifest_twice(choose, by):
    first = choose(by)
    assert first.code == 0, first.err
    assert choose(by, out="again.json").code == 0
    manifest = json.loads(Path("part.json").read_text())
    assert manifest == json.loads(Path("again.json").read_text())
    assert manifest["by"] == by
    assert manifest["settings"]["fraction"] == 0.25
    assert len(manifest["model_sha256"]) == len(manifest["rows_sha256"]) == 64
    if by == "keyword":
        # a fourth of the labelled tokens, whatever rows they are in
        kept = sum(len(places) for windows in manifest["labels"] for places in windows)
        assert kept == first.json["labels"]
        return
    scores, rows = manifest["scores"], manifest["indices"]
    assert len(scores) == 12
    assert rows == sorted(sorted(range(12), key=lambda row: -scores[row])[:3])


@pytest.mark.parametrize("by", ["random", "grand", "moderate", "mink", "worst"])
def test_smaller_parts_lie_in_larger_ones(choose, by):
    parts = []
    for number, share in enumerate((0.1, 0.4, 1)):
        outcome = choose(by, out=f"{number}.json", fraction=share)
        parts.append(set(outcome.json["indices"]))
    assert parts[0] < parts[1] < parts[2] == set(range(12))


def test_a_run_trains_on_the_part_and_measures_everything(run_npo):
    options = ("--forget-select", "mink", "--forget-fraction", "0.25", "--json")
    outcome = run_npo(*SHORT, "evals.max_rows=12", options=options)
    assert outcome.code == 0, outcome.err
    results = outcome.json
    assert len(results["training"]["curve"]) == 6  # as many steps as over all twelve rows
    assert results["details"]["after"]["forget_Q_A_Prob"]["n"] == 12
    manifest = json.loads(Path("out/manifest.json").read_text())
    chosen = manifest["selection"]
    assert chosen["indices"] == json.loads(Path("out/selection.json").read_text())["indices"]
    assert (chosen["rows"], chosen["of"], chosen["steps"]) == (3, 12, 6)
    assert (chosen["passes"], chosen["scaled_from"]) == (6.0, 2.0)
    assert manifest["forget"]["rows"] == 12
    report = Path("out/report.md").read_text()
    assert "Trained on 3 of the 12 forget rows (selected: mink); passed over 6 times" in report


def test_max_steps_of_the_user_is_left_alone(run_npo):
    options = ("--forget-select", "random", "--forget-fraction", "0.25", "--json")
    results = run_npo("training.max_steps=2", options=options).json
    assert len(results["training"]["curve"]) == 2
    assert "scaled_from" not in results["selection"]
    assert "passed over" not in Path("out/report.md").read_text()


@pytest.mark.parametrize("by", ["grand", "worst", "keyword"])
def test_flags_manifest_and_recipe_key_are_the_same_run(choose, run_npo, by):
    """grand takes gradients and worst trains: neither may leave a trace in the model."""
    assert choose(by, "--set", "training.per_device_train_batch_size=4",
                  "--set", "training.gradient_accumulation_steps=1",
                  "--set", "training.learning_rate=1e-3").code == 0  # fmt: skip
    flags = ("--forget-select", by, "--forget-fraction", 0.25)
    assert run_npo(*SHORT, options=flags, out="a").code == 0
    assert run_npo(*SHORT, options=("--forget-indices", "part.json"), out="b").code == 0
    keys = (f"data.select.by={by}", "data.select.fraction=0.25")
    assert run_npo(*SHORT, *keys, out="c").code == 0
    one, *others = (weights(run) for run in "abc")
    for other in others:
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_bare_list_of_rows_will_do(world, run_npo):
    Path("rows.json").write_text("[7, 2]")
    outcome = run_npo(options=("--forget-indices", "rows.json", "--json"))
    assert outcome.json["selection"]["indices"] == [2, 7]
    assert outcome.json["selection"]["by"] == "given rows"


def test_words_of_the_user_are_all_that_is_trained(world, run_npo):
    """Every answer is 'N was born.': the two words are some of its tokens, in all twelve rows."""
    keys = ("data.select.by=keyword", "data.select.keywords=[was]")
    outcome = run_npo(*keys, options=("--json",))
    assert outcome.code == 0, outcome.err
    chosen = outcome.json["selection"]
    assert chosen["rows"] == 12
    assert chosen["labels"] % 12 == 0
    assert "and in them on" in Path("out/report.md").read_text()


def test_a_stopped_run_goes_on_with_the_rows_it_chose(run_npo, unlearn, stop_at):  # noqa: F811
    options = ("--forget-select", "random", "--forget-fraction", "0.5")
    whole = run_npo(*SHORT, options=(*options, "--json"), out="whole").json
    stop_at(signal.SIGINT, event="step", step=2)
    assert run_npo(*SHORT, options=options).code == 75
    chosen = Path("out/selection.json").read_bytes()
    resumed = unlearn("resume", "out", "--json")
    assert resumed.code == 0, resumed.err
    assert Path("out/selection.json").read_bytes() == chosen
    assert resumed.json["metrics"] == whole["metrics"]
    assert all(torch.equal(t, weights("out")[name]) for name, t in weights("whole").items())


def test_a_plan_says_what_is_trained_on(world, unlearn):
    given = ("--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl",
             "--set", "training.per_device_train_batch_size=4",
             "--set", "training.gradient_accumulation_steps=1",
             "--set", "training.num_train_epochs=2")  # fmt: skip
    part = ("--forget-select", "mink", "--forget-fraction", "0.25")
    plan = unlearn("plan", "npo", *given, *part, "--json").json
    assert plan["steps"]["total"] == 6
    assert plan["selection"]["rows"] == 3
    assert plan["selection"]["passes"] == 6
    shown = unlearn("plan", "npo", *given, *part).out
    assert "trained on 3 of the 12 forget rows (mink), 6 times instead of 2" in shown


BAD = [
    (("--forget-select", "mink"), "fraction is missing"),
    (("--forget-fraction", "0.5"), "neither by nor manifest given"),
    (("--forget-select", "mink", "--forget-fraction", "0"), "must be greater than 0"),
    (("--forget-select", "mink", "--forget-fraction", "2"), "must be at most 1"),
    (("--forget-select", "mnik", "--forget-fraction", "0.5"), "'mnik' is not one of"),
    (("--forget-indices", "none.json"), "no selection file 'none.json'"),
    (("--forget-indices", "forget.jsonl"), "is not JSON"),
    (("--forget-indices", "empty.json"), "holds no row numbers"),
    (("--forget-indices", "far.json"), "names row 12, but 'forget.jsonl' has 12 rows"),
    (("--forget-indices", "twice.json"), "names a row twice"),
    (("--forget-indices", "other.json"), "was made for other rows"),
    (("--set", "data.select.by=random", "--set", "data.select.fraction=0.5", "--set",
      "data.select.k=0.2"), "only by: mink reads it"),
    (("--set", "data.select.by=keyword", "--set", "data.select.keywords=[Bergen]"),
     "in no answer of the forget set: 'Bergen'"),
    (("--set", "data.select.by=grand", "--set", "data.select.fraction=0.5", "--set",
      "data.select.parameters=[nothing]"), "no trained weight matches 'nothing'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), BAD, ids=[words for _, words in BAD])
def test_mistakes_are_one_line_and_leave_nothing(world, run_npo, options, words):
    for name, content in (("empty", []), ("far", [3, 12]), ("twice", [1, 1]),
                          ("other", {"indices": [1], "rows_sha256": "0" * 64})):  # fmt: skip
        Path(f"{name}.json").write_text(json.dumps(content))
    refused(run_npo(options=(*options, "--json")), words)
    assert not Path("out").exists()


def test_mistakes_of_the_command_itself(choose):
    Path("part.json").write_text("{}")
    refused(choose("mink"), "'part.json' already exists")
    refused(
        choose("keyword", "--set", "data.retain=null", out="new.json"), "data.retain is missing"
    )
    assert not Path("new.json").exists()


def test_grand_needs_a_loss(world, unlearn):
    outcome = unlearn("data", "select", "forget.jsonl", "--model", "model", "--by", "grand",
                      "--fraction", "0.5", "--out", "new.json", "--json")  # fmt: skip
    refused(outcome, "grand needs the loss it is about", "--recipe")
