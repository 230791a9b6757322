import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.data.encode import Example, encode
from unlearn.data.templates import Template
from unlearn.evals.benchmark import Metric, Result
from unlearn.evals.forget_retain import ForgetRetain, Split
from unlearn.evals.generate import generate
from unlearn.evals.metrics import rouge_l_recall
from unlearn.evals.side_by_side import side_by_side

ROWS = [
    {"question": "Where was Ada born?", "answer": "Ada was born in Oslo."},
    {"question": "What does Bo paint?", "answer": "Boats."},
    {"question": "Who is quick?", "answer": "The quick brown fox jumps over the lazy dog."},
    {"question": "And again?", "answer": "Again and again, in the morning."},
]


def split(rows: list[dict[str, Any]], tokenizer: Any, template: str | None = None) -> Split:
    written = Template.for_tokenizer(tokenizer, template)
    return Split(rows, encode(rows, tokenizer, written, max_length=512, source="rows"), written)


def memorise(model: Any, examples: list[Example], steps: int = 150) -> None:
    """Teach a model some rows so that part of what it says is right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for example in examples:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_mean_and_standard_error_by_hand() -> None:
    # mean 3, squared deviations 4 + 1 + 9 = 14, variance 14/2 = 7, standard error sqrt(7/3)
    metric = Metric.mean([1.0, 2.0, 6.0], "lower")
    assert (metric.value, metric.n, metric.direction) == (3.0, 3, "lower")
    assert metric.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert Metric.mean([0.5], "none").standard_error is None


def test_a_row_that_is_not_a_number_is_not_averaged_away() -> None:
    metric = Metric.mean([0.5, math.nan], "lower")
    assert math.isnan(metric.value)
    expected = {"value": None, "standard_error": None, "low": None, "high": None} | {
        "n": 2,
        "direction": "lower",
    }
    assert metric.to_dict() == expected


def test_numbers_equal_each_row_scored_by_itself(tiny_model: Any, tiny_tokenizer: Any) -> None:
    given = split(ROWS, tiny_tokenizer)
    memorise(tiny_model, given.examples[:2])
    result = ForgetRetain(given, given, max_new_tokens=30).run(tiny_model, tiny_tokenizer)
    for example, record in zip(given.examples, result.records, strict=False):
        ids = torch.tensor(example.input_ids)
        with torch.no_grad():
            logits = tiny_model(ids[None]).logits[0]
        start = example.prompt_length
        answer, predicting = ids[start:], logits[start - 1 : -1]
        chosen = predicting.log_softmax(-1)[range(len(answer)), answer]
        assert record["prob"] == pytest.approx(math.exp(chosen.mean()), rel=1e-4)
        assert record["avg_loss"] == pytest.approx(-chosen.mean().item(), rel=1e-4)
        right = (predicting.argmax(-1) == answer)[:-1].tolist()
        suffix = next((n for n, hit in enumerate(reversed(right)) if not hit), len(right))
        assert record["extraction_strength"] == pytest.approx(suffix / len(right))
        assert record["num_tokens"] == len(answer)
        assert record["rouge_l_recall"] == rouge_l_recall(record["answer"], record["generation"])
    strengths = [record["extraction_strength"] for record in result.records]
    assert 1.0 in strengths
    assert min(strengths) < 1.0


def test_batches_change_nothing(tiny_model: Any, tiny_tokenizer: Any) -> None:
    given = split(ROWS, tiny_tokenizer)
    one, many = (
        ForgetRetain(given, given, max_new_tokens=20, batch_tokens=size).run(
            tiny_model, tiny_tokenizer
        )
        for size in (1, 8192)
    )
    assert [r["row"] for r in one.records] == [0, 1, 2, 3] * 2
    for first, second in zip(one.records, many.records, strict=True):
        assert first.pop("prob") == pytest.approx(second.pop("prob"), rel=1e-5)
        assert first.pop("avg_loss") == pytest.approx(second.pop("avg_loss"), rel=1e-5)
        assert first == second


def test_answers_are_those_of_plain_generation(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Tokens taken over from the teacher-forced pass change no answer."""
    given = split(ROWS, tiny_tokenizer)
    memorise(tiny_model, given.examples[:2])
    result = ForgetRetain(given, max_new_tokens=20).run(tiny_model, tiny_tokenizer)
    prompts = [given.template.prompt_ids(row, tiny_tokenizer) for row in ROWS]
    plain = generate(tiny_model, tiny_tokenizer, prompts, max_new_tokens=20)
    assert [record["generation"] for record in result.records] == plain
    assert plain[:2] == [row["answer"] for row in ROWS[:2]]
    assert plain[2] != ROWS[2]["answer"]


def test_a_prompt_whose_end_merges_with_the_answer_is_not_a_hint(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """'Answer: ' + 'Ada' holds the token ' Ada': cut by length it would give the answer away."""
    given = split(ROWS[:1], tiny_tokenizer, "Question: {question}\nAnswer: ")
    prompt = given.template.prompt_ids(ROWS[0], tiny_tokenizer)
    assert given.examples[0].input_ids[: len(prompt)] != prompt
    result = ForgetRetain(given, max_new_tokens=8).run(tiny_model, tiny_tokenizer)
    expected = generate(tiny_model, tiny_tokenizer, [prompt], max_new_tokens=8)
    assert [record["generation"] for record in result.records] == expected


def test_max_rows_keeps_the_first_rows_and_says_so(tiny_model: Any, tiny_tokenizer: Any) -> None:
    given = split(ROWS, tiny_tokenizer)
    result = ForgetRetain(given, max_rows=2, generate=False).run(tiny_model, tiny_tokenizer)
    assert [record["question"] for record in result.records] == [
        row["question"] for row in ROWS[:2]
    ]
    assert result.settings["rows"] == {"forget": {"evaluated": 2, "given": 4}}
    assert list(result.metrics) == ["forget_Q_A_Prob", "forget_extraction_strength"]
    assert result.metrics["forget_Q_A_Prob"].n == 2


def test_directions(tiny_model: Any, tiny_tokenizer: Any) -> None:
    given = split(ROWS[:2], tiny_tokenizer)
    result = ForgetRetain(given, given, max_new_tokens=2).run(tiny_model, tiny_tokenizer)
    wanted = {name: metric.direction for name, metric in result.metrics.items()}
    assert wanted == {
        "forget_Q_A_Prob": "lower",
        "forget_Q_A_ROUGE": "lower",
        "forget_extraction_strength": "lower",
        "retain_Q_A_Prob": "higher",
        "retain_Q_A_ROUGE": "higher",
        "retain_extraction_strength": "higher",
    }


def test_text_has_no_answers_to_write(tiny_model: Any, tiny_tokenizer: Any) -> None:
    rows = [{"text": "The quick brown fox jumps over the lazy dog, again and again."}]
    template = Template.for_tokenizer(tiny_tokenizer)
    examples = encode(rows, tiny_tokenizer, template, max_length=10, source="rows")
    result = ForgetRetain(Split(rows, examples, template)).run(tiny_model, tiny_tokenizer)
    assert list(result.metrics) == ["forget_Q_A_Prob", "forget_extraction_strength"]
    assert result.metrics["forget_Q_A_Prob"].n == len(examples) > 1


def test_the_last_answer_of_a_conversation_is_asked_for(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    turns = [("user", "Hello?"), ("assistant", "Bo."), ("user", "Who?"), ("assistant", "Ada.")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    given = split(rows, tiny_tokenizer)
    memorise(tiny_model, given.examples)
    result = ForgetRetain(given, max_new_tokens=10).run(tiny_model, tiny_tokenizer)
    (record,) = result.records
    assert (record["question"], record["answer"], record["generation"]) == ("Who?", "Ada.", "Ada.")
    assert record["rouge_l_recall"] == 1.0


def test_a_broken_model_is_shown_as_broken(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_model.lm_head.weight[7] = math.nan
    given = split(ROWS[:2], tiny_tokenizer)
    result = ForgetRetain(given, max_new_tokens=2).run(tiny_model, tiny_tokenizer)
    assert result.values()["forget_Q_A_Prob"] is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_model_is_left_as_found(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.train()
    weights = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    ForgetRetain(split(ROWS[:1], tiny_tokenizer), max_new_tokens=2).run(tiny_model, tiny_tokenizer)
    assert tiny_model.training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert all(torch.equal(value, weights[k]) for k, value in tiny_model.state_dict().items())


def test_progress_names_the_stage_and_counts_rows(tiny_model: Any, tiny_tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    given = split(ROWS, tiny_tokenizer)
    ForgetRetain(given, max_new_tokens=2).run(
        tiny_model, tiny_tokenizer, progress=lambda *event: seen.append(event)
    )
    assert ("forget: scoring", 4, 4) in seen
    assert seen[-1] == ("forget: answering", 4, 4)


def test_side_by_side_takes_the_first_answers_of_each_split() -> None:
    def result(word: str, rows: int) -> dict[str, Any]:
        return {
            "records": [
                {"split": s, "row": i, "question": f"{s}{i}?", "answer": "a", "generation": word}
                for s in ("forget", "retain")
                for i in range(rows)
            ]
        }

    found = side_by_side({"before": result("x", 3), "after": result("y", 2)}, per_split=3)
    assert [example["question"] for example in found] == [
        "forget0?",
        "forget1?",
        "retain0?",
        "retain1?",
    ]
    expected = {"split": "forget", "question": "forget0?", "answer": "a", "before": "x"}
    assert found[0] == expected | {"after": "y"}


def evaluate_tofu(shared: Path, name: str, rows: int) -> Result:
    from unlearn.models import load_model, load_tokenizer

    folder = str(shared / "models" / name)
    tokenizer = load_tokenizer(folder)

    def read(config: str) -> list[dict[str, Any]]:
        lines = (shared / "data" / "tofu" / f"{config}.json").read_text().splitlines()
        return [json.loads(line) for line in lines[:rows]]

    benchmark = ForgetRetain(
        split(read("forget10"), tokenizer), split(read("full"), tokenizer), max_rows=rows
    )
    return benchmark.run(load_model(folder, device="cpu"), tokenizer)


def check_parity(shared: Path, name: str, rows: int) -> None:
    """Compare with open-unlearning's own evaluation of the same model, row by row.

    The 2e-5 between the losses is not our arithmetic: float64 inference on the shipped fp16 weights
    is as far from open-unlearning's. It probably ran before the weights were rounded to fp16, which
    was not proven. Its extraction strength gives 1/n to a row whose last prediction is wrong, where
    the exact definition gives 0.
    """
    with gzip.open(shared / "parity" / f"tofu_eval_ou_{name}.json.gz") as file:
        theirs = json.load(file)
    result = evaluate_tofu(shared, name, rows)
    assert len(result.records) == 2 * rows

    def column(record: dict[str, Any], metric: str) -> dict[str, Any]:
        found: dict[str, Any] = theirs[metric]["value_by_index"][str(record["row"])]
        return found

    for record in result.records:
        names = record["split"]
        scored = column(record, f"{names}_Q_A_Prob")
        written = column(record, f"{names}_Q_A_ROUGE")
        assert record["prob"] == pytest.approx(scored["prob"], abs=5e-5)
        assert record["avg_loss"] == pytest.approx(scored["avg_loss"], abs=5e-5)
        assert record["rouge_l_recall"] == pytest.approx(written["rougeL_recall"], abs=1e-9)
        if names == "forget":
            exact = record["extraction_strength"]
            quirk = exact or 1 / (record["num_tokens"] - 1)
            assert quirk == pytest.approx(column(record, "extraction_strength")["score"], abs=1e-6)
    if rows == 400:
        for metric in ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_Prob"):
            value = result.metrics[metric].value
            assert value == pytest.approx(theirs[metric]["agg_value"], abs=5e-5)


MODELS = ["tofu-tiny-target", "tofu-tiny-retain90"]


@pytest.mark.parametrize("name", MODELS)
def test_first_rows_equal_open_unlearning(shared: Path, name: str) -> None:
    check_parity(shared, name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_rows_equal_open_unlearning(shared: Path, name: str) -> None:
    check_parity(shared, name, 400)
