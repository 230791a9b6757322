"""Post-training recipes: two stages in one run, stops in either, what is refused."""

import json
import os
import signal
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unlearn import models
from unlearn.errors import Interrupted, UserError
from unlearn.recipes.files import dump, load
from unlearn.recipes.plan import plan_run
from unlearn.recipes.prepare import prepare
from unlearn.recipes.run import resume, run
from unlearn.runs import RunFolder

QUICK = [
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "first.training.gradient_accumulation_steps=1",
    "first.training.num_train_epochs=1",
    "first.training.learning_rate=1e-3",
    "training.learning_rate=1e-3",
    "evals.max_new_tokens=4",
]


def prepare_folder(folder: Path) -> None:
    """Write a tiny model, ten pairs and four other rows."""
    from tests.conftest import build_model, build_tokenizer

    build_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    pairs = [
        {"question": f"Who is {n}?", "chosen": f"{n} paints.", "rejected": f"{n} was a boat."}
        for n in range(10)
    ]
    held = [{"question": f"Who is {n}?", "answer": f"{n} paints."} for n in range(10, 14)]
    for name, rows in (("pairs", pairs), ("held", held)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


def make(method: str = "redi", *changes: str, out: str = "out") -> Any:
    """Give a runnable recipe on what is in this folder."""
    given = {"model": {"path": "model"}, "data": {"pairs": "pairs.jsonl"}, "out": out}
    quick = [one for one in QUICK if method == "redi" or not one.startswith("first")]
    return load(method, [*quick, *changes], given)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: Any) -> Any:
    """Give a function that makes a runnable recipe on ten pairs, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    prepare_folder(tmp_path)
    return make


@pytest.fixture(scope="module")
def done(tmp_path_factory: Any) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Give the folder, the results and the events of one run of REDI."""
    folder: Path = tmp_path_factory.mktemp("redi")
    prepare_folder(folder)
    events: list[dict[str, Any]] = []
    with chdir(folder):
        results = run(make("redi", "data.heldout=held.jsonl"), emit=events.append)
    return folder / "out", results, events


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


def test_redi_trains_two_stages_in_one_folder(done: Any) -> None:
    """3 steps of plain training, 3 of REDI, numbered through; the first model is kept."""
    folder, results, events = done
    steps = [event for event in events if event["event"] == "step"]
    assert [(event["step"], event["of"]) for event in steps] == [(n, 6) for n in range(1, 7)]
    assert all("text/nll" in event for event in steps[:3])
    assert all("rejected/answer_ascent" in event for event in steps[3:])
    assert {"chosen/nll", "rejected/entropy", "pairs/accuracy"} <= set(steps[3])
    before, after = (results["metrics"][name] for name in ("before", "after"))
    assert after["pairs_margin"] > before["pairs_margin"]
    assert after["heldout_loss"] < before["heldout_loss"]
    assert set(before) == {
        *("heldout_loss", "heldout_answer_tokens", "heldout_unfinished"),
        *("pairs_accuracy", "pairs_margin", "chosen_logp", "rejected_logp"),
    }
    assert (folder / "first" / "model" / "model.safetensors").is_file()
    assert results["provenance"]["first"]["steps"] == 3
    assert results["training"]["steps"] == 6
    page = (folder / "report.md").read_text()
    assert page.startswith("# Post-training report")
    for word in ("forget", "unlearn", "retain"):
        said = page.partition("## Where this comes from")[0].lower()
        assert word not in said, word


def test_a_run_repeats_from_its_recipe(done: Any, tmp_path: Path) -> None:
    """It says all that is needed, from anywhere, for both stages."""
    again = load(
        done[0] / "recipe.yaml", ["evals.generate=false"], {"out": str(tmp_path / "again")}
    )
    assert again.first is not None
    assert again.first.training.learning_rate == 1e-3
    run(again)
    for name, tensor in weights(done[0]).items():
        assert torch.equal(tensor, weights(tmp_path / "again")[name])


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_stopped_in_either_stage_ends_as_one_that_was_not(
    recipe: Any, done: Any, at: int
) -> None:
    """Steps 1-3 are the first stage, 4-6 the second."""

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=f"stopped after step {at}, which is saved"):
        run(recipe("redi", "evals.generate=false"), emit=stop)
    assert (Path("out") / "first" / "model").is_dir() == (at == 5)
    resume(load("out/recipe.yaml", [], {"out": "out"}), RunFolder(Path("out")))
    for name, tensor in weights(done[0]).items():
        torch.testing.assert_close(tensor, weights("out")[name], rtol=0, atol=1e-6)


def test_second_stages_start_from_the_first_stages_model(recipe: Any, done: Any) -> None:
    """Without the first stage, REDI from the model that the first stage made is the same."""
    start = [f"model.path={done[0] / 'first' / 'model'}", "first=null", "evals.generate=false"]
    run(recipe("redi", *start))
    for name, tensor in weights(done[0]).items():
        assert torch.equal(tensor, weights("out")[name])


def test_methods_without_a_reference_never_load_a_second_model(
    recipe: Any, monkeypatch: Any
) -> None:
    """The model at the start, and those measured: after the first stage, and at the end."""
    loaded: list[str] = []
    original = models.load_model

    def load_model(source: Any, **how: Any) -> Any:
        loaded.append(source.path)
        return original(source, **how)

    monkeypatch.setattr(models, "load_model", load_model)
    run(recipe("simpo", "evals.generate=false"))
    assert [Path(path).name for path in loaded] == ["model", "model"]
    assert not any(Path("cache").glob("reference/*"))


def test_adapters_are_merged_between_the_stages(recipe: Any) -> None:
    run(recipe("redi", "model.lora.rank=4", "evals.generate=false"))
    first, last = weights("out/first"), weights("out")
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert (Path("out") / "adapter").is_dir()
    assert (Path("out") / "first" / "adapter").is_dir()


def test_a_collapse_is_told_and_can_stop_the_training(recipe: Any) -> None:
    """At a rate of 1 chosen answers become unlikely at once."""
    wild = [
        "first=null", "training.learning_rate=0.3", "training.num_train_epochs=6", "alpha=5",
        "training.warmup_epochs=0", "training.collapse.window=2", "evals.generate=false",
    ]  # fmt: skip
    stopped = run(recipe("redi", *wild, "training.collapse.stop=true", out="stopped"))
    assert stopped["training"]["steps"] < 18
    assert any("training stops here" in text for text in stopped["warnings"])


def test_text_stands_for_the_chosen_answers_unless_it_is_given(recipe: Any) -> None:
    made = prepare(recipe())
    assert made.streams["text"] is made.streams["chosen"]
    assert made.first is not None
    assert (made.first.anchor, made.anchor) == ("text", "chosen")
    other = prepare(recipe("redi", "data.text=held.jsonl"))
    assert len(other.streams["text"].examples) == 4
    assert other.first is not None
    assert other.first.steps == 1


def test_the_two_answers_of_a_pair_go_together(recipe: Any) -> None:
    dataset = prepare(recipe()).dataset
    for index in range(10):
        item = dataset[3, index]
        assert item["chosen"].index == item["rejected"].index == index


def test_first_training_takes_over_what_it_does_not_say(recipe: Any) -> None:
    found = recipe("redi", "training.weight_decay=0.5", "alpha=0.3")
    assert found.first.training.weight_decay == 0.5
    assert found.first.training.num_train_epochs == 1
    assert found.terms[1].weight == 0.3
    assert load_text(dump(found)) == found


def load_text(text: str) -> Any:
    Path("written.yaml").write_text(text)
    return load("written.yaml")


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("redi", "data.forget=pairs.jsonl", "data.forget: given with terms that post-train"),
        ("redi", "evals.tofu={}", "evals.tofu: given with terms that post-train"),
        ("redi", "model.retain_model=model", "model.retain_model: given with terms"),
        ("redi", "model={lora: {}, quantize: nf4}", "model.quantize: given with first"),
        ("redi", "terms.rejected.on=forget", "either post-trains"),
        ("redi", "first.terms.text.on=forget", "first.terms: must be on chosen, rejected or text"),
        ("redi", "first.terms.text.objective=nlll", "first.terms.0.objective: 'nlll' given"),
        ("redi", "first.training.lr=1", "unknown key; did you mean 'training.learning_rate'"),
        ("redi", "alpha=-1", "terms.1.weight: -1 given; must be at least 0"),
        ("simpo", "terms.chosen.rejected=null", "needs 'rejected'"),
        ("sft", "terms.text.reweight.strategy=linuper", "did you mean 'linupper'"),
        ("sft", "terms.text.reweight.max_ratio=3", "max_weight_ratio"),
        ("sft", "terms.text.reweight.max_weight_ratio=0.5", "must be at least 1"),
        ("npo", "data.pairs=x.jsonl", "data.pairs: given, but no term reads it"),
        ("dpo", "data.text=x.jsonl", "data.text: given, but no term reads it"),
        ("npo", "first.terms=[{objective: nll, on: forget}]", "given with terms that unlearn"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(method: str, change: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(method, [change])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["terms.text.reweight.scope=micro", "training.per_device_train_batch_size=1"],
            "stands alone",
        ),
        (
            ["terms.text.reweight.scope=step", "terms.text.objective=kl_all_positions"],
            "no loss of single rows",
        ),
        (
            ["terms.text.objective=dco", "data.text=long.jsonl"],
            "is for answers of 64 tokens or fewer",
        ),
    ],
)  # fmt: skip
def test_what_cannot_mean_anything_is_refused(recipe: Any, change: list[str], message: str) -> None:
    row = {"question": "Who?", "answer": "a b c " * 60}
    Path("long.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        prepare(recipe("sft", "data.pairs=null", "data.text=held.jsonl", *change))


def test_a_model_that_gives_no_numbers_is_refused_before_it_is_measured(
    recipe: Any, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tiny_model.model.norm.weight.data[0] = torch.nan
    for one in (tiny_model, tiny_tokenizer):
        one.save_pretrained("broken")
    with pytest.raises(UserError, match="'broken' gives NaN or infinite numbers"):
        run(recipe("sft", "data.pairs=null", "data.text=held.jsonl", "model.path=broken"))


def test_missing_data_is_asked_for_with_its_flag() -> None:
    missing = {name: load(name).missing() for name in ("redi", "sft", "dpo")}
    assert missing["redi"][1].startswith("data.pairs is missing (--pairs")
    assert missing["sft"][1].startswith("data.text is missing (--text")
    assert not any("forget" in line for lines in missing.values() for line in lines)


def test_a_plan_counts_both_stages(recipe: Any) -> None:
    """Ten pairs, 4 at once: 3 steps of each stage; two rows of a pair go through together."""
    planned = plan_run(prepare(recipe()))
    assert (planned["first_steps"], planned["steps"]["total"]) == (3, 3)
    assert planned["anchor"] == "chosen"
    part = next(one for one in planned["memory"] if one["part"] == "activations")
    assert part["why"].startswith("8 rows, ")


def test_streams_apart_need_less_memory(recipe: Any) -> None:
    """The published recipe sends one side after the other; together both are held."""

    def activations(*change: str) -> float:
        planned = plan_run(prepare(recipe("redi", "first=null", *change)))
        return next(one for one in planned["memory"] if one["part"] == "activations")["bytes"]

    together = activations("training.passes=together")
    assert 0.4 * together < activations() < 0.7 * together


def test_what_slopes_cannot_stand_for_is_refused(recipe: Any) -> None:
    dpo = "{objective: preference, on: chosen, rejected: rejected}"
    terms = f"terms=[{dpo}, {{objective: ent_nll, on: text}}]"
    with pytest.raises(UserError, match=r"training.passes=apart given with 'preference'"):
        prepare(recipe("dpo", "training.passes=apart", terms))
    prepare(recipe("dpo", terms))


def test_reweighting_and_pruning_run_and_tell_what_they_did(recipe: Any) -> None:
    """Ten rows, four epochs, half of the easy half left out of three: 10 + 3 * 7 rows."""
    changes = [
        "terms.text.reweight={scope: step, warmup: 0.0}", "training.num_train_epochs=4",
        "training.prune={method: infobatch}", "evals.generate=false",
    ]  # fmt: skip
    results = run(recipe("sft", *changes))
    assert results["training"]["rows"] == 31
    assert results["training"]["rows_unpruned"] == 40
    assert results["training"]["steps"] == 8
    assert any("4 rows are weighted against each other" in text for text in results["warnings"])
    assert "text/weight_ess" in results["training"]["curve"][-1]
