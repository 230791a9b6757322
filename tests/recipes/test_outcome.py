"""Runs whose result is more than trained weights: assistants, edits, extra rows."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unlearn.checkpoints import prune
from unlearn.data.sources import load_variants
from unlearn.errors import Interrupted, UserError
from unlearn.head import plain
from unlearn.models import load_model, weights_hash
from unlearn.recipes import inputs
from unlearn.recipes.plan import plan_run
from unlearn.recipes.prepare import prepare
from unlearn.recipes.run import resume, run
from unlearn.runs import RunFolder

SMALL = ("assistant.layers=1", "model.lora.rank=2", "training.warmup_steps=0")
ASSISTED = {"uld": SMALL, "offset": SMALL, "whp": SMALL[1:]}
IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize("method", ASSISTED)
def test_a_run_leaves_a_composition(recipe, method):
    before = load_model("model", device="cpu")
    results = run(recipe(method, *ASSISTED[method], "evals.every=3"))
    assert results["status"] == "complete"
    assert results["metrics"]["after"] != results["metrics"]["before"]
    assert weights_hash(load_model("model", device="cpu")) == weights_hash(before)
    model = load_model("out/model", device="cpu")
    assert plain(model).config.num_hidden_layers == {"uld": 3, "offset": 4, "whp": 4}[method]
    assert not torch.equal(model(IDS).logits, before(IDS).logits)
    assert not Path("out/adapter").exists()
    assert {path.name for path in Path("out/model").rglob("*.safetensors")} == {
        "adapter_model.safetensors"
    }
    assert {row["step"] for row in results["steps"]} == {3}


def test_what_is_measured_on_the_way_is_base_and_assistant_together(recipe):
    """The last measured step is the last step: it must be what the reloaded folder gives."""
    changes = (*SMALL, "evals.every=2", "evals.select_best.metric=forget_Q_A_Prob")
    results = run(recipe("uld", *changes))
    at_end = json.loads(Path("out/evals/step-6.json").read_text())["metrics"]
    best = min(
        json.loads(path.read_text())["metrics"]["forget_Q_A_Prob"]["value"]
        for path in Path("out/evals").glob("step-*.json")
    )
    assert results["metrics"]["after"]["forget_Q_A_Prob"] == pytest.approx(best, abs=1e-6)
    assert at_end["forget_Q_A_Prob"]["value"] >= best - 1e-6


def test_weight_zero_leaves_every_number_as_it_was(recipe):
    results = run(recipe("uld", *SMALL, "assistant.weight=0.0", "training.max_steps=2"))
    assert results["metrics"]["after"] == results["metrics"]["before"]


def test_a_stopped_run_goes_on_to_the_same_adapter(recipe):
    import signal

    changes = (*SMALL, "training.save_steps=1")
    run(recipe("uld", *changes, out="whole"))

    def stop(event):
        if event["event"] == "step" and event["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(recipe("uld", *changes, out="stopped"), emit=stop)
    prune(Path("stopped/checkpoints"), 1)
    resume(recipe("uld", *changes, out="stopped"), RunFolder(Path("stopped")))
    whole, stopped = (load_model(f"{out}/model", device="cpu") for out in ("whole", "stopped"))
    assert weights_hash(whole) == weights_hash(stopped)


@pytest.mark.parametrize("lora", [False, True])
def test_a_task_vector_moves_away_from_the_forget_set(recipe, lora):
    more = ("model.lora={rank: 2, alpha: 4.0}",) if lora else ()
    results = run(recipe("task_vector", "edit.scale=2.0", "training.warmup_steps=0", *more))
    after, before = (results["metrics"][name]["forget_Q_A_Prob"] for name in ("after", "before"))
    assert after < before
    edited = AutoModelForCausalLM.from_pretrained("out/model").state_dict()
    start = AutoModelForCausalLM.from_pretrained("model").state_dict()
    assert edited.keys() == start.keys()
    assert Path("out/adapter/adapter_config.json").is_file() == lora


def test_task_vector_is_the_formula(recipe):
    """The fine-tuned model of the same run, without the edit, by scale -1: start + 1 step."""
    step = ("training.max_steps=2", "training.warmup_steps=0", "training.learning_rate=1e-3")
    run(recipe("task_vector", *step, "edit=null", out="tuned"))
    run(recipe("task_vector", *step, "edit.scale=3.0", out="edited"))
    start, tuned, edited = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in ("model", "tuned/model", "edited/model")
    )
    for name, weight in start.items():
        expected = weight - 3.0 * (tuned[name] - weight)
        torch.testing.assert_close(edited[name], expected, rtol=0, atol=1e-6)


def rows_in_other_words() -> None:
    rows = [
        {
            "question": f"Who is {n}?",
            "answer": f"{n} was born.",
            "paraphrased_question": f"Say who {n} is.",
            "perturbed_answer": [f"{n} was found.", f"{n} was made.", f"{n} was sent."],
        }
        for n in range(10)
    ]
    Path("words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


EXTRA = (
    "data.forget_extra=[{source: words.jsonl, columns: {question: paraphrased_question}}]",
    "data.retain_extra=[{source: words.jsonl, columns: {answer: perturbed_answer}, take: 2}]",
)


def test_extra_rows_are_trained_on_and_not_measured(recipe):
    rows_in_other_words()
    made = recipe("uld", *SMALL, *EXTRA, "training.max_steps=1")
    prepared = prepare(made)
    sizes = {name: len(one.examples) for name, one in prepared.streams.items()}
    assert sizes == {"forget": 20, "retain": 30}
    assert prepared.steps_per_epoch == 5
    decode = prepared.tokenizer.decode
    assert "Say who 0 is." in decode(prepared.streams["forget"].examples[10].input_ids)
    texts = [decode(one.input_ids) for one in prepared.streams["retain"].examples[10:13]]
    assert [text.split("Answer:\n")[1] for text in texts] == [
        "0 was found.</s>", "0 was made.</s>", "1 was found.</s>"
    ]  # fmt: skip
    results = run(made)
    assert results["provenance"]["retain"]["extra"] == 20
    stored = json.loads(Path("out/evals/after.json").read_text())
    assert {row["question"] for row in stored["records"]} == {f"Who is {n}?" for n in range(3)}
    written = inputs.absolute(made).data
    assert written.retain_extra[0].source == str(Path("words.jsonl").absolute())


def test_extra_rows_name_what_is_wrong(recipe):
    rows_in_other_words()
    with pytest.raises(UserError, match=r"row 1 of 'words.jsonl': column 'perturbed_answer' holds"):
        load_variants("words.jsonl", columns={"answer": "perturbed_answer"}, take=4)
    with pytest.raises(UserError, match=r"no column 'perturbed' .*did you mean 'perturbed_answer'"):
        load_variants("words.jsonl", columns={"answer": "perturbed"})
    with pytest.raises(UserError, match="unknown standard column 'reply'"):
        load_variants("words.jsonl", columns={"reply": "answer"})
    with pytest.raises(UserError, match=r"did you mean 'source'|unknown key"):
        recipe("uld", "data.forget_extra=[{sorce: words.jsonl}]")
    with pytest.raises(UserError, match=r"absent.jsonl"):
        inputs.check_inputs(recipe("uld", "data.forget_extra=[{source: absent.jsonl}]"))


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("uld", ("model.lora=null",), "assistant: given without model.lora"),
        ("uld", ("assistant.weight=-1.0",), "assistant.weight: -1.0 given; must be at least 0"),
        ("uld", ("assistant.combine=add",), "must be one of subtract, offset, suppress"),
        ("uld", ("assistant.top_filter=1.0",), "top_filter: 1.0 given; must be less than 1"),
        ("offset", ("assistant.top_filter=0.1",), "which filters nothing"),
        ("uld", ("launch.engine=zero3",), "use ddp or zero2"),
        ("uld", ("model.quantize=nf4",), "model.quantize, which it cannot share"),
        ("uld", ("edit.name=task_vector",), "edit: given with assistant"),
        ("task_vector", ("evals.every=2",), "edit: given with evals.every"),
        ("task_vector", ("edit.name=tsk_vector",), "did you mean 'task_vector'"),
        ("task_vector", ("edit.scle=2.0",), "did you mean 'scale'"),
        ("task_vector", ("edit.scale=-2.0",), "greater than 0"),
    ],
)
def test_mistakes_in_the_recipe_are_named(recipe, method, changes, words):
    with pytest.raises(UserError, match=words):
        recipe(method, *changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("assistant.layers=3",), "assistant.layers=3 given, but the model has 2 layers"),
        (("terms.forget.objective=npo",), "npo compares with the model at the start"),
        (("terms.forget.objective=rmu", "terms.forget.layer=0"), "rmu reads a layer"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(recipe, changes, words):
    with pytest.raises(UserError, match=words):
        run(recipe("uld", *SMALL, *changes))
    assert not Path("out").exists()


def test_a_composition_cannot_be_unlearned_again(recipe):
    run(recipe("uld", *SMALL, "training.max_steps=1", "evals.generate=false"))
    with pytest.raises(UserError, match=r"cannot be changed again \(give its base, "):
        prepare(recipe("npo", "model.path=out/model", out="second"))


def test_a_plan_counts_adapters_and_shared_weights_once(recipe):
    plain_plan = plan_run(prepare(recipe("npo", "model.lora={rank: 2}")))
    found = plan_run(prepare(recipe("uld", *SMALL)))
    weights = plain_plan["parameters"]["total"] - plain_plan["parameters"]["trainable"]
    assert found["parameters"]["trainable"] * 2 == plain_plan["parameters"]["trainable"]
    assert found["parameters"]["total"] - found["parameters"]["trainable"] == weights
    files = {entry["path"]: entry["bytes"] for entry in found["files"]}
    assert files["model/"] == 4 * found["parameters"]["trainable"]
    assert "adapter/" not in files
