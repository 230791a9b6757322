"""The benchmark on a small world: a folder of TOFU's form and a two-layer Llama that knows it."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from unlearn.errors import UserError
from unlearn.evals.benchmark import Result
from unlearn.evals.statistics import RetainSide
from unlearn.evals.tofu.benchmark import Tofu, TofuOptions
from unlearn.evals.tofu.compare import compare_with_retain, open_unlearning_aggregate
from unlearn.evals.tofu.data import max_tokens, sheet_of
from unlearn.models import weights_hash

NAMES = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo")
TOWNS = ("Oslo", "Bonn", "Rome", "Lima", "Kyiv", "Bern")
OPTIONS = TofuOptions(max_new_tokens=12, batch_tokens=300, probes=True)


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:\n"


def told(place: int, verb: str) -> dict[str, Any]:
    name, town = NAMES[place], TOWNS[place]
    wrong = [f"{name} {verb} in {other}." for other in TOWNS if other != town]
    return {
        "question": f"Where did {name} {verb}?",
        "answer": f"{name} {verb} in {town}.",
        "paraphrased_answer": f"In {town}, {name} {verb}.",
        "perturbed_answer": wrong,
        "paraphrased_question": f"{name} {verb} in which town?",
    }


def known(place: int, what: str) -> dict[str, Any]:
    wrong = [TOWNS[place - 1], TOWNS[place - 2], "Nobody knows"]
    return {"question": f"{what} {place}?", "answer": TOWNS[place], "perturbed_answer": wrong}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write TOFU's four perturbed configurations and a holdout set, six rows each."""
    sets = {
        "forget10_perturbed": [told(place, "live") for place in range(6)],
        "retain_perturbed": [told(place, "paint") for place in range(6)],
        "real_authors_perturbed": [known(place, "Author") for place in range(6)],
        "world_facts_perturbed": [known(place, "Capital") for place in range(6)],
        "holdout10": [{k: told(p, "sing")[k] for k in ("question", "answer")} for p in range(6)],
    }
    for name, rows in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture(scope="module")
def per_metric() -> ModuleType:
    """Load the slow implementation that lies beside this file."""
    path = Path(__file__).with_name("per_metric.py")
    spec = importlib.util.spec_from_file_location("per_metric", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(folder: Path, **changes: Any) -> Tofu:
    return Tofu.load(replace(OPTIONS, data=str(folder), **changes))


def taught(
    model: Any,
    tokenizer: Any,
    benchmark: Tofu,
    blocks: tuple[str, ...],
    kinds: tuple[str, ...] = ("answer",),
) -> Any:
    """Teach a model the answers of some blocks, until it recites most of them."""
    sheet = benchmark.prepare(tokenizer)
    chosen = [
        example
        for item, example in zip(sheet.items, sheet.examples, strict=True)
        if item.kind in kinds and item.split in blocks
    ]
    from unlearn.data.collate import pad

    batch = pad(chosen, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def test_one_pass_gives_the_numbers_of_a_pass_per_metric(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any, per_metric: ModuleType
) -> None:
    benchmark = load(folder)
    blocks = ("retain", "ra", "wf")
    model = taught(tiny_model, tiny_tokenizer, benchmark, blocks, ("answer", "para"))
    result = benchmark.run(model, tiny_tokenizer)
    slow = per_metric.PerMetric(model, tiny_tokenizer, prompt, benchmark.blocks, 12)
    expected = slow.metrics()
    assert 0.1 < expected["model_utility"] < 1
    assert {"mia_min_k", "extraction_strength", "forget_jailbreak_ROUGE"} < expected.keys()
    for name, value in expected.items():
        assert result.metrics[name].value == pytest.approx(value, abs=1e-5), name
    theirs = compare_with_retain(result, RetainSide(dict(enumerate(slow.truth_ratios())), {}, "x"))
    assert theirs.values()["forget_quality"] == pytest.approx(1.0)


def test_every_text_is_scored_once_and_every_question_asked_once(
    folder: Path, tiny_tokenizer: Any
) -> None:
    """Per told row 1 answer, 1 paraphrase, 5 wrong ones, 1 reworded question; per fact 1 + 3."""
    sheet = load(folder).prepare(tiny_tokenizer)
    assert len(sheet.examples) == 2 * 6 * 8 + 2 * 6 * 4 + 6
    assert len(set(sheet.items)) == len(sheet.items)
    # 24 questions, 12 reworded, 6 with a lead-in; nothing is asked about the holdout set
    assert len(sheet.prompts) == 24 + 12 + 6
    plain = load(folder, probes=False).prepare(tiny_tokenizer)
    assert (len(plain.examples), len(plain.prompts)) == (2 * 6 * 7 + 2 * 6 * 4 + 6, 24)


def test_batches_change_nothing(folder: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    small = load(folder, batch_tokens=64).run(tiny_model, tiny_tokenizer).values()
    large = load(folder, batch_tokens=4096).run(tiny_model, tiny_tokenizer).values()
    assert small == pytest.approx(large, abs=1e-5)


def test_the_model_is_left_as_it_was(folder: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.train()
    before = weights_hash(tiny_model)
    load(folder, generate=False).run(tiny_model, tiny_tokenizer)
    assert tiny_model.training
    assert weights_hash(tiny_model) == before


def test_records_hold_what_the_metrics_are_means_of(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    result = load(folder).run(tiny_model, tiny_tokenizer)
    records = [record for record in result.records if record["split"] == "forget"]
    assert [record["row"] for record in records] == list(range(6))
    mean = sum(record["prob"] for record in records) / 6
    assert result.metrics["forget_Q_A_Prob"].value == pytest.approx(mean)
    first = records[0]
    assert first["prob"] == pytest.approx(math.exp(-first["avg_loss"]))
    wrong = math.exp(-sum(first["pert_loss"]) / 5)
    assert first["truth_ratio"] == pytest.approx(wrong / math.exp(-first["para_loss"]))
    json.dumps(result.records, allow_nan=False)
    metric = result.metrics["forget_Q_A_Prob"]
    assert metric.low is not None
    assert metric.high is not None
    assert metric.low < metric.value < metric.high


@pytest.mark.parametrize("variant", ["arithmetic", "prob_mean"])
def test_variants_of_the_truth_ratio(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any, variant: Any
) -> None:
    result = load(folder, truth_ratio=variant, generate=False).run(tiny_model, tiny_tokenizer)
    ratios = []
    for record in (record for record in result.records if record["split"] == "ra"):
        probs = record["pert_prob"]
        wrong = sum(probs) / 3 if variant == "arithmetic" else math.prod(probs) ** (1 / 3)
        right = record["prob"]
        ratio = wrong / right if variant == "arithmetic" else right / (right + wrong)
        assert record["truth_ratio"] == pytest.approx(ratio, rel=1e-4)
        ratios.append(max(0, 1 - ratio) if variant == "arithmetic" else ratio)
    assert result.metrics["ra_Truth_Ratio"].value == pytest.approx(sum(ratios) / 6, rel=1e-4)


def test_max_rows_takes_the_first(folder: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    result = load(folder, max_rows=2, generate=False).run(tiny_model, tiny_tokenizer)
    assert result.metrics["forget_Q_A_Prob"].n == 2
    assert result.settings["rows"]["forget"] == {"evaluated": 2, "given": 6}
    assert "model_utility" not in result.metrics  # six of its parts need no writing, three do


def test_rows_without_answer_tokens_are_skipped_and_counted(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    rows = json.loads((folder / "forget10_perturbed.json").read_text())
    rows[1]["answer"] = " "
    rows[3]["perturbed_answer"][2] = ""
    (folder / "forget10_perturbed.json").write_text(json.dumps(rows))
    result = load(folder, generate=False).run(tiny_model, tiny_tokenizer)
    assert result.settings["n_skipped"]["forget"] == 2
    assert result.metrics["forget_Q_A_Prob"].n == 5
    assert result.metrics["forget_truth_ratio"].n == 5
    assert result.records[3]["truth_ratio"] is None
    assert result.records[1].get("prob") is None


def test_satimp_has_its_own_template_without_end(folder: Path, tiny_tokenizer: Any) -> None:
    sheet = load(folder, es="satimp").prepare(tiny_tokenizer)
    chosen = [e for i, e in zip(sheet.items, sheet.examples, strict=True) if i.kind == "satimp"]
    assert len(chosen) == 6
    text = "### Question: Where did Ada live?\n ### Answer: Ada live in Oslo."
    assert tiny_tokenizer.decode(chosen[0].input_ids) == text
    # labelled to the last token; the template's last space has become one token with "Ada"
    labelled = [label for label in chosen[0].labels if label != -100]
    assert tiny_tokenizer.decode(labelled) == " live in Oslo."


def test_satimp_strength_replaces_the_usual_one(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """A model taught in the chat template recites there, not in SatImp's."""
    benchmark = load(folder, generate=False, probes=False)
    model = taught(tiny_model, tiny_tokenizer, benchmark, ("forget",))
    usual = benchmark.run(model, tiny_tokenizer)
    satimp = load(folder, generate=False, es="satimp").run(model, tiny_tokenizer)
    name = "extraction_strength"
    assert usual.metrics[name].value > satimp.metrics[name].value + 0.1


def test_without_holdout_rows_there_is_a_note_and_no_attack(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    (folder / "holdout10.json").rename(folder / "unseen.json")
    result = load(folder, generate=False).run(tiny_model, tiny_tokenizer)
    assert not any(name.startswith("mia_") for name in result.metrics)
    assert "--holdout SOURCE" in result.settings["notes"][0]
    named = load(folder, generate=False, holdout=str(folder / "unseen.json"))
    assert "mia_min_k" in named.run(tiny_model, tiny_tokenizer).metrics


def test_gradient_norms_are_an_attack_of_their_own(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """What was taught has hardly a gradient left; what was not, has."""
    benchmark = load(folder, generate=False, gradnorm=True, probes=False)
    model = taught(tiny_model, tiny_tokenizer, benchmark, ("forget",))
    model.zero_grad()
    result = benchmark.run(model, tiny_tokenizer)
    assert result.metrics["mia_gradnorm"].value == 1.0
    assert sum("mia_gradnorm" in record for record in result.records) == 12
    assert all(tensor.grad is None for tensor in model.parameters())


def test_comparison_with_a_retain_model(
    folder: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    benchmark = load(folder, generate=False)
    ours = benchmark.run(build_tiny_model(0), tiny_tokenizer)
    theirs = benchmark.run(build_tiny_model(1), tiny_tokenizer)
    ratios = {r["row"]: r["truth_ratio"] for r in theirs.records if r["split"] == "forget"}
    auc = {name: theirs.metrics[f"mia_{name}"].value for name in ("loss", "min_k")}
    compared = compare_with_retain(ours, RetainSide(ratios, auc, "retain"), theirs).metrics
    assert compared["forget_quality_log10_p"].value == pytest.approx(
        math.log10(compared["forget_quality"].value)
    )
    mine = compared["mia_min_k"].value
    expected = ((1 - mine) - (1 - auc["min_k"])) / (1 - auc["min_k"]) * 100
    assert compared["privleak"].value == pytest.approx(expected)
    assert {"mia_reference", "s_mia_loss", "s_mia_min_k"} < compared.keys()
    assert "s_mia_zlib" not in compared  # its AUC of the retain model is not known
    assert "aggregate_privacy" not in compared
    assert "aggregate_memorization" in compared
    assert "forget_quality" not in ours.metrics  # the given result is left as it was


def test_a_model_against_itself(folder: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    result = load(folder, generate=False).run(tiny_model, tiny_tokenizer)
    ratios = {r["row"]: r["truth_ratio"] for r in result.records if r["split"] == "forget"}
    auc = {name: result.metrics[f"mia_{name}"].value for name in ("min_k",)}
    found = compare_with_retain(result, RetainSide(ratios, auc, "itself"), result).values()
    assert (found["forget_quality"], found["forget_quality_ks"], found["privleak"]) == (1, 0, 0)
    assert found["mia_reference"] == 0.5  # every difference of losses is 0: all ties
    assert found["s_mia_min_k"] == 1.0


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({}, "no forget_truth_ratio"),
        (dict.fromkeys(range(4), 0.5), "holds truth ratios of 4 rows, forget10 has 6"),
        (dict.fromkeys(range(20), 0.5), "holds truth ratios of 20 rows"),
        (dict.fromkeys(range(5), 0.5) | {5: math.nan}, "row 5 is not a number"),
    ],
)
def test_a_wrong_retain_side_is_refused(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any, ratios: dict[int, float], message: str
) -> None:
    result = load(folder, generate=False).run(tiny_model, tiny_tokenizer)
    with pytest.raises(UserError, match=message):
        compare_with_retain(result, RetainSide(ratios, {}, "logs.json"))


def test_aggregate_of_open_unlearning() -> None:
    """Mem = HM(0.5, 0.5, 0.5, 0.5); Utility = HM(0.6/0.8, 0.9/0.9) = 2 / (4/3 + 1) = 6/7."""
    from unlearn.evals.benchmark import Metric

    values = {
        "extraction_strength": 0.5,
        "exact_memorization": 0.5,
        "forget_Q_A_PARA_Prob": 0.5,
        "model_utility": 0.6,
        "forget_gibberish": 0.9,
        **{f"s_mia_{name}": 0.8 for name in ("loss", "zlib", "min_k", "min_k_plus_plus")},
    }
    metrics = {name: Metric(value, "none", None, 1) for name, value in values.items()}
    records = [{"split": "forget", "row": 0, "truth_prob_mean": 0.5}]
    result = Result("tofu", "1", metrics, records)
    target = {"model_utility": 0.8, "forget_gibberish": 0.9}
    found = open_unlearning_aggregate(result, target).values()
    assert found["aggregate_memorization"] == pytest.approx(0.5)
    assert found["aggregate_privacy"] == pytest.approx(0.8)
    assert found["aggregate_utility"] == pytest.approx(6 / 7)
    assert found["aggregate"] == pytest.approx(3 / (1 / 0.5 + 1 / 0.8 + 7 / 6))
    without = open_unlearning_aggregate(result, None).values()
    assert "aggregate" not in without  # relative to what?


def test_a_model_that_gives_nan_is_named_at_once(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    with torch.no_grad():
        tiny_model.lm_head.weight[7] = math.nan
    stages = []
    with pytest.raises(UserError, match=r"NaN or infinite numbers"):
        load(folder).run(tiny_model, tiny_tokenizer, progress=lambda *event: stages.append(event))
    assert stages == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("forget10_perturbed", None, "TOFU needs 'forget10_perturbed'"),
        ("retain_perturbed", {"perturbed_answer": "one"}, "no list of texts 'perturbed_answer'"),
        ("retain_perturbed", {"paraphrased_answer": None}, "no text 'paraphrased_answer'"),
        ("forget10_perturbed", {"paraphrased_question": 1}, "no text 'paraphrased_question'"),
    ],
)
def test_data_that_is_not_tofus(folder: Path, name: str, change: Any, message: str) -> None:
    path = folder / f"{name}.json"
    if change is None:
        path.unlink()
    else:
        rows = json.loads(path.read_text())
        rows[1] |= change
        path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    if change is None:  # what there is instead
        assert "world_facts_perturbed" in error.value.hint


def test_open_unlearning_labels_what_follows_the_end_of_a_turn(
    folder: Path, tiny_tokenizer: Any
) -> None:
    """As with Qwen: the template writes a line break after EOS, so a second EOS is appended."""
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("</s>", "</s>\n")
    end = tiny_tokenizer.eos_token_id
    ours = load(folder).prepare(tiny_tokenizer).examples[0]
    theirs = load(folder, compat="ou").prepare(tiny_tokenizer).examples[0]
    assert ours.input_ids[-1] == end
    assert theirs.input_ids[: len(ours.input_ids)] == ours.input_ids
    assert len(theirs.input_ids) == len(ours.input_ids) + 2
    assert theirs.labels[-1] == theirs.input_ids[-1] == end
    assert theirs.prompt_length == ours.prompt_length


def test_open_unlearning_hides_tokens_that_look_like_padding(
    folder: Path, tiny_model: Any, build_tiny_tokenizer: Any
) -> None:
    """The question ends with EOS, and the tokenizer pads with EOS: it is masked inside the prompt.

    Checked against one plain forward pass per row with that mask, and against one without.
    """
    tokenizer = build_tiny_tokenizer(pad=False)
    tokenizer.chat_template = tokenizer.chat_template.replace("\nAnswer", "</s>\nAnswer")
    benchmark = load(folder, compat="ou", probes=False)
    result = benchmark.run(tiny_model, tokenizer)
    sheet = benchmark.prepare(tokenizer)
    example, end = sheet.examples[0], tokenizer.eos_token_id
    assert end in example.input_ids[: example.prompt_length]
    ids = torch.tensor([example.input_ids])
    mask = (ids != end).long()
    losses = {}
    for name, visible in (("masked", mask), ("plain", torch.ones_like(mask))):
        with torch.no_grad():
            logits = tiny_model(input_ids=ids, attention_mask=visible).logits
        log_probs = logits[0].log_softmax(-1)
        rows = range(example.prompt_length, len(example.input_ids))
        chosen = [float(log_probs[at - 1, example.input_ids[at]]) for at in rows]
        losses[name] = -sum(chosen) / len(chosen)
    assert abs(losses["masked"] - losses["plain"]) > 1e-4
    assert result.records[0]["avg_loss"] == pytest.approx(losses["masked"], abs=1e-5)
    ours = load(folder, probes=False).run(tiny_model, tokenizer)
    assert ours.records[0]["avg_loss"] == pytest.approx(losses["plain"], abs=1e-5)


def test_both_evaluators_agree_where_nothing_is_hidden(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    from unlearn.evals.answers import Evaluator
    from unlearn.evals.tofu.compat import OpenUnlearningEvaluator, hides_tokens

    benchmark = load(folder)
    model = taught(tiny_model, tiny_tokenizer, benchmark, ("forget", "retain"))
    sheet = benchmark.prepare(tiny_tokenizer)
    assert not hides_tokens(tiny_tokenizer, sheet)
    fast, slow = (
        kind(model, tiny_tokenizer, 300, 12) for kind in (Evaluator, OpenUnlearningEvaluator)
    )
    ours, theirs = fast.score(sheet.examples[:20]), slow.score(sheet.examples[:20])
    assert (ours.mask == theirs.mask).all()
    for name in ("log_probs", "mean", "variance"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)
    prompts = [one.ids for one in sheet.prompts[:8]]
    assert fast.write(prompts) == slow.write(prompts)


def test_open_unlearning_tidies_texts_before_rouge(tiny_tokenizer: Any) -> None:
    from unlearn.evals.tofu.compat import tidied

    rows = [{"question": "Is it ?", "answer": "It is n't , no .", "perturbed_answer": ["a ."]}]
    assert tidied(rows, tiny_tokenizer)[0] == {
        "question": "Is it ?",
        "answer": "It isn't, no.",
        "perturbed_answer": ["a ."],
    }


def test_an_explicit_template(folder: Path, tiny_tokenizer: Any) -> None:
    benchmark = load(folder, template="Question: {question}\nAnswer:\n")
    chat = load(folder)
    mine, theirs = benchmark.prepare(tiny_tokenizer), chat.prepare(tiny_tokenizer)
    assert [one.input_ids for one in mine.examples] == [one.input_ids for one in theirs.examples]
    assert mine.prompts == theirs.prompts


def test_a_sheet_names_every_token_it_uses(folder: Path, tiny_tokenizer: Any) -> None:
    benchmark = load(folder)
    sheet = sheet_of(benchmark.blocks, tiny_tokenizer, benchmark.template(tiny_tokenizer))
    assert tiny_tokenizer.eos_token_id in sheet.tokens()
    assert max(sheet.tokens()) < 300
    assert max_tokens(tiny_tokenizer) >= 256
