"""Recipes on pairs of answers: what is drawn, stored, planned and measured before training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.data.people import demo_folder, write_people
from unlearn.errors import UserError
from unlearn.models import load_model
from unlearn.recipes.files import load
from unlearn.recipes.inputs import absolute, check_early
from unlearn.recipes.plan import plan_run
from unlearn.recipes.prepare import Prepared, prepare
from unlearn.recipes.run import resume, run
from unlearn.recipes.train import make_trainer, measure_start
from unlearn.runs import RunFolder
from unlearn.scores import Scorer

LAYERS = ["terms.forget.layer=1", "terms.retain.layer=1"]
ALL = [*LAYERS, r"training.trainable=[layers\.(0|1)\.mlp\.down_proj]"]
FEW = ["training.num_train_epochs=3", "training.gradient_accumulation_steps=1"]


@pytest.fixture
def prepared(tmp_path: Path) -> Any:
    """Give a function from a method and overrides to a prepared recipe: 40 forget rows."""
    people = write_people(tmp_path / "people")

    def build(method: str, *overrides: str, forget: str = "") -> Prepared:
        changes = {
            "model": {"path": str(demo_folder() / "target")},
            "data": {"forget": forget or f"{people}#forget", "retain": f"{people}#retain"},
            "out": str(tmp_path / "run"),
        }
        return prepare(load(method, overrides, changes))

    return build


def test_every_pair_that_a_run_meets_is_there_and_no_other(prepared: Any) -> None:
    made = prepared("idk_ap", *FEW)
    data, met = made.dataset, {"refusal": set(), "retain_refusal": set()}
    for epoch in range(3):
        for index in range(40):
            item = data[epoch, index]
            for name in met:
                met[name].add(item[name].index)
            question = made.tokenizer.decode(item["refusal"].example.input_ids)
            assert made.given["forget"].rows[index]["question"] in question
    for name, places in met.items():
        assert places == set(range(len(made.streams[name].examples)))
    assert len(met["refusal"]) <= 120


def test_a_refusal_keeps_the_prompt_and_trains_the_refusal_alone(prepared: Any) -> None:
    made = prepared("idk_dpo", *FEW)
    stream, forget = made.streams["refusal"], made.given["forget"]
    for (row, _), place in list(stream.draws.places.items())[:20]:
        ours, theirs = stream.examples[place], forget.examples[row]
        assert ours.prompt_length == theirs.prompt_length
        assert ours.input_ids[: ours.prompt_length] == theirs.input_ids[: theirs.prompt_length]
        labelled = [label for label in ours.labels if label != -100]
        text = made.tokenizer.decode(labelled, skip_special_tokens=True)
        assert text.strip() == stream.rows[place]["answer"]


def test_the_stored_reference_is_that_of_the_pair_in_the_batch(
    prepared: Any, tmp_path: Path
) -> None:
    """Every stored number that training would be given equals a fresh reading of that row."""
    made = prepared("idk_dpo", *FEW)
    model = load_model(made.source)
    trainer = make_trainer(
        made, model, RunFolder(tmp_path), weights_hash="test", emit=lambda event: None
    )
    assert set(trainer.data_collator.reference) == {"forget", "refusal"}
    scorer = Scorer.for_model(model)
    for epoch in (0, 2):
        items = [made.dataset[epoch, index] for index in range(12)]
        batch = trainer.data_collator(items)
        for name in ("forget", "refusal"):
            with torch.no_grad():
                fresh = scorer(model, batch[name])
            torch.testing.assert_close(
                batch[name]["reference_log_probs"], fresh.log_probs, rtol=0, atol=2e-5
            )


def test_what_no_term_reads_does_not_go_through_the_model(prepared: Any) -> None:
    assert set(prepared("idk_nll", *FEW).dataset[0, 0]) == {"refusal", "retain"}
    assert set(prepared("idk_dpo", *FEW).dataset[0, 0]) == {"refusal", "forget", "retain"}
    assert set(prepared("grad_ascent", *FEW).dataset[0, 0]) == {"forget", "retain"}


def test_a_plan_counts_every_stream(prepared: Any) -> None:
    """Rows at once are 8 of each stream; tokens per step are the sum of the streams' means."""
    for method, names in (
        ("npo", ("forget", "retain")),
        ("idk_nll", ("refusal", "retain")),
        ("idk_dpo", ("forget", "refusal", "retain")),
        ("idk_ap", ("refusal", "retain", "retain_refusal")),
    ):
        made = prepared(method, *FEW)
        planned = plan_run(made)
        part = next(one for one in planned["memory"] if one["part"] == "activations")
        assert part["why"].startswith(f"{8 * len(names)} rows, ")
        means = [
            sum(len(row.input_ids) for row in made.streams[name].examples)
            / len(made.streams[name].examples)
            for name in names
        ]
        assert planned["tokens"]["per_step"] == pytest.approx(8 * sum(means), abs=1)


def alternates(tmp_path: Path, count: int) -> str:
    rows = [
        {"question": f"Who is {n}?", "answer": f"{n} is a baker.",
         "alternate": [f"{n} is a {trade}." for trade in ("poet", "pilot", "judge")[:count]]}
        for n in range(10)
    ]  # fmt: skip
    path = tmp_path / "alternates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_alternates_are_met_in_turn(prepared: Any, tmp_path: Path) -> None:
    made = prepared("altpo", *FEW, forget=alternates(tmp_path, 3))
    stream = made.streams["alternate"]
    assert len(stream.examples) == 30
    for index in range(10):
        met = [made.dataset[epoch, index]["alternate"].index for epoch in range(3)]
        assert {stream.rows[place]["answer"] for place in met} == {
            f"{index} is a {trade}." for trade in ("poet", "pilot", "judge")
        }
    assert set(made.measures.benchmarks[0].forget.rows[0]) >= {"question", "answer"}


def test_mistakes_are_named_before_anything_else(prepared: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match="has no 'alternate'"):
        prepared("altpo")
    with pytest.raises(UserError, match=r"is empty \(0 bytes\)"):
        prepared("idk_dpo", f"data.refusals={empty}")
    for method, change, message in (
        ("npo", "terms.forget.rejected=refusal", "npo takes no pair"),
        ("idk_dpo", "terms.forget.rejected=null", "dpo compares two answers and needs 'rejected'"),
        ("idk_dpo", "terms.forget.rejected=retain", "a pair answers one question"),
        ("idk_dpo", "terms.forget.rejected=refusal", "which is `on` too"),
        ("idk_dpo", "terms.forget.rejected=foget", "did you mean 'forget'"),
        ("idk_nll", "terms.forget.on=retain", "nothing would be forgotten"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(method, [change])
        assert "\n" not in str(error.value)


def test_gamma_and_alpha_find_the_terms_on_other_answers() -> None:
    recipe = load("idk_ap", ["gamma=2", "alpha=3", "beta=0.5"])
    assert [(term.on, term.weight) for term in recipe.terms] == [("refusal", 2.0), ("retain", 3.0)]
    assert recipe.terms[1].hyper == {"beta": 0.5}
    assert "rejected" not in recipe.model_dump()["terms"][0]


def test_a_retain_set_is_asked_for(tmp_path: Path) -> None:
    changes = {"model": {"path": "m"}, "data": {"forget": "f"}, "out": str(tmp_path / "o")}
    with pytest.raises(UserError, match=r"data\.retain is missing .*'ap' is on retain"):
        load("idk_ap", [], changes).require_runnable()


def test_refusals_are_found_from_anywhere_and_checked_early(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.txt").write_text("No.\n")
    recipe = load("idk_dpo", ["data.refusals=r.txt"])
    assert absolute(recipe).data.refusals == str(tmp_path / "r.txt")
    given = {"model": {"path": "./m"}, "data": {"forget": "f", "retain": "r"}, "out": "out"}
    Path("m").mkdir()
    with pytest.raises(UserError, match=r"no file of refusals 'absent\.txt'"):
        check_early("idk_dpo", ["data.refusals=absent.txt"], given)


def test_the_norm_is_that_of_the_first_rows_whatever_the_batch(prepared: Any) -> None:
    """The mean over the labelled tokens of 40 rows, taken from transformers' own hidden states."""
    found = []
    for batch, accumulate in ((8, 1), (2, 4), (1, 3)):
        made = prepared(
            "adaptive_rmu", *ALL,
            f"training.per_device_train_batch_size={batch}",
            f"training.gradient_accumulation_steps={accumulate}",
        )  # fmt: skip
        model = load_model(made.source)
        found.append(measure_start(made, model).measured["forget/adaptive_rmu"]["token_norm"])
    assert found[0] == found[1] == found[2]
    norms = []
    with torch.no_grad():
        for row in made.given["forget"].examples:
            ids = torch.tensor([row.input_ids])
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            layer = model.model.layers[1](states[1], position_embeddings=model.model.rotary_emb(
                states[1], torch.arange(ids.shape[1])[None]))  # fmt: skip
            layer = layer[0] if isinstance(layer, tuple) else layer
            norms += layer[0].norm(dim=-1)[torch.tensor(row.labels) != -100].tolist()
    assert found[0] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


def test_the_norm_is_kept_with_the_run_and_taken_from_there(prepared: Any, tmp_path: Path) -> None:
    few = ["training.max_steps=2", "evals.generate=false", "evals.max_rows=4"]
    recipe = prepared("adaptive_rmu", *ALL, *few).recipe
    run(recipe, offline=True)
    folder = RunFolder(tmp_path / "run")
    manifest = json.loads(folder.manifest.read_text())
    kept = manifest["measured"]["forget/adaptive_rmu"]["token_norm"]
    assert kept > 0

    manifest["measured"]["forget/adaptive_rmu"]["token_norm"] = 2 * kept
    folder.manifest.write_text(json.dumps(manifest))
    for path in (folder.checkpoints, folder.model):
        shutil.rmtree(path)
    folder.results.unlink()
    (folder.path / "events.jsonl").rename(folder.path / "before.jsonl")
    resume(recipe, folder, offline=True)
    first = [
        next(e for e in map(json.loads, path.read_text().splitlines()) if e["event"] == "step")
        for path in (folder.path / "before.jsonl", folder.path / "events.jsonl")
    ]
    assert first[1]["forget/adaptive_rmu"] > 2 * first[0]["forget/adaptive_rmu"]


def test_a_given_norm_is_not_measured(prepared: Any) -> None:
    made = prepared("adaptive_rmu", *ALL, "terms.forget.token_norm=3.0")
    assert measure_start(made, None).measured == {}
    assert made.terms[0].hyper["token_norm"] == 3.0
