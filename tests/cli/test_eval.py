"""``unlearn eval``: what the commands print and write, and every mistake in one line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

QUESTIONS = [
    {"question": f"Where was {n} born?", "choices": ["Ada", "Bo", "Oslo", "fox"], "answer": n % 4}
    for n in range(8)
]


def group() -> None:
    """Run the group alone, as ``unlearn eval`` does."""
    from unlearn.cli.entry import guarded
    from unlearn.cli.evals import app

    guarded(app)


@pytest.fixture
def evaluate(world: Path, unlearn: Any) -> Callable[..., Any]:
    """Give a function that runs ``unlearn eval ARGUMENTS`` beside a tiny ``model``."""
    return lambda *arguments: unlearn(*arguments, program=group)


@pytest.fixture
def questions(world: Path) -> Path:
    """Give a folder with eight questions of each set of WMDP."""
    folder = world / "wmdp"
    folder.mkdir()
    for name in ("bio", "chem", "cyber"):
        lines = [json.dumps(question) for question in QUESTIONS]
        (folder / f"wmdp-{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def refused(outcome: Any, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert sum(line.startswith("error: ") for line in outcome.err.splitlines()) == 1
    for word in words:
        assert word in outcome.err


def test_wmdp_prints_and_writes_everything(evaluate: Any, questions: Path) -> None:
    outcome = evaluate("wmdp", "--model", "model", "--data", "wmdp", "--limit", 5, "--out", "e",
                       "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = outcome.json
    names = ["wmdp/acc", "wmdp_bio/acc", "wmdp_chem/acc", "wmdp_cyber/acc"]
    assert list(found["metrics"]) == names
    assert found["details"]["wmdp/acc"]["n"] == 15
    assert found["warnings"] == ["'wmdp' has no questions for mmlu"]
    stored = json.loads(Path("e/results.json").read_text())
    assert stored["status"] == "complete"
    assert stored["metrics"] == {"after": found["metrics"]}
    summary = json.loads(Path("e/LMEval_SUMMARY.json").read_text())
    assert {name: summary[name] for name in names} == found["metrics"]
    samples = json.loads(Path("e/LMEval_EVAL.json").read_text())
    assert [len(samples[f"wmdp_{name}"]) for name in ("bio", "chem", "cyber")] == [5, 5, 5]
    run = json.loads(Path("e/RUN.json").read_text())
    assert len(run["provenance"]["weights_sha256"]) == 64
    assert set(run["settings"]["data_sha256"]) == {"wmdp_bio", "wmdp_chem", "wmdp_cyber"}
    assert run["settings"]["limit"] == 5
    for name in ("report.html", "report.md"):
        assert "wmdp" in Path("e", name).read_text()
    refused(evaluate("wmdp", "--model", "model", "--data", "wmdp", "--out", "e"), "already exists")


def test_wmdp_for_people(evaluate: Any, questions: Path) -> None:
    outcome = evaluate("wmdp", "--model", "model", "--data", "wmdp", "--tasks", "bio")
    assert outcome.code == 0, outcome.err
    assert "wmdp_bio/acc" in outcome.out
    assert "wmdp/acc" not in outcome.out
    assert "guessing gives 0.25" in outcome.out


WMDP_MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model": (("--model", "./none", "--data", "wmdp"), ("no model folder './none'",)),
    "task": (("--model", "model", "--tasks", "bo"), ("unknown task 'bo'; did you mean 'bio'?",)),
    "folder": (("--model", "model", "--data", "none"), ("no folder 'none'",)),
    "set": (
        ("--model", "model", "--data", "wmdp", "--tasks", "mmlu"),
        ("'wmdp' has no questions for mmlu", "name the files mmlu.jsonl"),
    ),
    "offline": (("--model", "model", "--offline"), ("'wmdp_bio' is not on", "give --data DIR")),
    "batch": (("--model", "model", "--data", "wmdp", "--batch-size", "x"), ("batch size 'x'",)),
    "limit": (("--model", "model", "--limit", "0"), ("--limit",)),
    "out": (("--model", "model", "--out", "model"), ("'model' already exists",)),
}


@pytest.mark.parametrize("name", WMDP_MISTAKES)
def test_mistakes_of_wmdp(evaluate: Any, questions: Path, monkeypatch: Any, name: str) -> None:
    """Each is found before weights are loaded."""
    loaded: list[str] = []
    monkeypatch.setattr("unlearn.models.load_model", lambda *a, **k: loaded.append("loaded"))
    arguments, words = WMDP_MISTAKES[name]
    outcome = evaluate("wmdp", *arguments, "--json")
    refused(outcome, *words)
    assert outcome.json["error"]["exit_code"] == 2
    assert loaded == []


def test_a_wrong_row_is_named(evaluate: Any, questions: Path) -> None:
    row = json.dumps(QUESTIONS[0] | {"answer": 7})
    (questions / "wmdp-bio.jsonl").write_text(f"{json.dumps(QUESTIONS[0])}\n{row}\n")
    outcome = evaluate("wmdp", "--model", "model", "--data", "wmdp")
    refused(outcome, "row 2 of 'wmdp/wmdp-bio.jsonl': 'answer' is 7, not one of 0 to 3")


def test_mistakes_of_lm_eval(evaluate: Any) -> None:
    outcome = evaluate("lm-eval", "--model", "model", "--tasks", "arc_esy", "--json")
    refused(outcome, "lm-eval has no task 'arc_esy'; did you mean 'arc_easy'?")
    refused(evaluate("lm-eval", "--model", "model", "--tasks", ","), "no task was named")


def test_generate_sets_answers_side_by_side(evaluate: Any) -> None:
    """Two models, one prompt of our own and two rows; without --json for people, as a file too."""
    arguments = ("generate", "--model", "model", "--target", "model", "--max-new-tokens", 4,
                 "--prompt", "Where is Ada?", "--prompts", "forget.jsonl:[:2]")  # fmt: skip
    outcome = evaluate(*arguments, "--out", "answers.json", "--json")
    assert outcome.code == 0, outcome.err
    rows = outcome.json["rows"]
    assert [row["question"] for row in rows][:2] == ["Where is Ada?", "Where was 0 born?"]
    assert [row["answer"] for row in rows] == [None, "0 was born.", "1 was born."]
    for row in rows:
        assert list(row["answers"]) == ["target", "unlearned"]
        assert row["answers"]["target"] == row["answers"]["unlearned"]
    assert rows[0]["rouge_l_recall"] == {}
    assert set(rows[1]["rouge_l_recall"]) == {"target", "unlearned"}
    assert json.loads(Path("answers.json").read_text()) == outcome.json
    people = evaluate(*arguments, "--out", "answers.md")
    assert people.code == 0, people.err
    assert "true answer" in people.out
    assert "- **true answer**: 1 was born." in Path("answers.md").read_text()
    refused(evaluate(*arguments, "--out", "answers.md"), "'answers.md' already exists")


def test_answers_that_are_known(shared: Path, unlearn: Any) -> None:
    """The target has memorised its forget set; the retain model has never seen it."""
    models = shared / "models"
    outcome = unlearn("generate", "--model", models / "tofu-tiny-retain90",
                      "--target", models / "tofu-tiny-target", "--json",
                      "--prompts", f"{shared}/data/tofu#forget10:train[:3]",
                      program=group)  # fmt: skip
    assert outcome.code == 0, outcome.err
    for row in outcome.json["rows"]:
        assert row["answers"]["target"] == row["answer"]
        assert row["rouge_l_recall"]["target"] == 1.0
        assert row["rouge_l_recall"]["unlearned"] < 0.9


def test_a_model_without_chat_template_goes_on_from_the_prompt(evaluate: Any) -> None:
    Path("model/chat_template.jinja").unlink()
    arguments = ("generate", "--model", "model", "--max-new-tokens", 3, "--json")
    assert evaluate(*arguments, "--prompt", "Ada").code == 0
    refused(evaluate(*arguments, "--prompts", "forget.jsonl"), "no chat template")
    ours = ("--template", r"Question: {question}\nAnswer: ")
    assert evaluate(*arguments, "--prompts", "forget.jsonl:[:1]", *ours).code == 0


def test_a_model_cannot_steer_the_terminal(monkeypatch: Any, capsys: Any) -> None:
    from unlearn.cli.eval_tables import print_answers

    answers = {"unlearned": "\x1b[31mred\x07 Ada", "target": "[bold]Ada[/bold]"}
    row = {"question": "Who\x1b[2J?", "answer": "Ada", "answers": answers, "rouge_l_recall": {}}
    print_answers({"rows": [row]})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]Ada[/bold]" in out


GENERATE_MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "there is nothing to ask"),
    "empty prompt": (("--prompt", " "), "a --prompt is empty"),
    "no source": (("--prompts", "none.jsonl"), "no file or folder 'none.jsonl'"),
    "no target": (("--prompt", "Ada", "--target", "./none"), "no model folder './none'"),
    "template": (("--prompt", "Ada", "--template", "Question:"), "{question} 0 times"),
    "out": (("--prompt", "Ada", "--out", "a.txt"), "unknown kind '.txt'"),
    "out folder": (("--prompt", "Ada", "--out", "none/a.md"), "no folder 'none'"),
    "long": (("--prompt", "Ada " * 300), "prompt 1 has"),
}


@pytest.mark.parametrize("name", GENERATE_MISTAKES)
def test_mistakes_of_generate(evaluate: Any, name: str) -> None:
    arguments, words = GENERATE_MISTAKES[name]
    refused(evaluate("generate", "--model", "model", *arguments), words)


def test_a_broken_model_does_not_pass_for_one_that_forgot(evaluate: Any) -> None:
    weights = load_file("model/model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, "model/model.safetensors", {"format": "pt"})
    refused(evaluate("generate", "--model", "model", "--prompt", "Ada"), "'model' gives NaN")


def test_import_prints_one_object(shared: Path, unlearn: Any) -> None:
    """The published logs of TOFU: the p-value to the last bit, as in evaluation 2.4."""
    logs = shared / "golden/tofu-logs"
    full, retain = (logs / f"llama2-7b_{name}.json.gz" for name in ("full", "retain90"))
    outcome = unlearn("import", full, "--retain-logs", retain, "--json", program=group)
    assert outcome.code == 0, outcome.err
    quality = outcome.json["forget_quality"]
    assert set(quality) == {"p", "log10_p", "ks"}
    assert quality["p"] == 1.834066410994743e-21
    assert outcome.json["model_utility"] == pytest.approx(0.6227, abs=5e-5)
    assert len(outcome.json["model_utility_parts"]) == 9
    alone = unlearn("import", full, "--truth-ratio", "arithmetic", "--json", program=group)
    assert alone.json["forget_quality"] is None
    assert alone.json["model_utility"] == pytest.approx(0.5859, abs=5e-5)
    people = unlearn("import", full, "--retain-logs", retain, program=group)
    assert "1.83e-21" in people.out
    assert "0.6227" in people.out


def test_mistakes_of_import(evaluate: Any) -> None:
    refused(evaluate("import", "none.json"), "cannot read 'none.json'")
    refused(evaluate("import", "forget.jsonl"), "'forget.jsonl' is not JSON")
    score = {"value_by_index": {"0": {"score": math.nan}}, "agg_value": None}
    Path("nan.json").write_text(json.dumps({"forget_truth_ratio": score}))
    refused(evaluate("import", "nan.json", "--json"), "forget row 0 has a truth ratio that is not")
    refused(evaluate("import", "nan.json", "--truth-ratio", "geo"), "truth-ratio")


def test_help_shows_examples_and_is_quick(unlearn: Any) -> None:
    for command in ("wmdp", "lm-eval", "generate", "import", "tofu"):
        outcome = unlearn(command, "--help", program=group)
        assert outcome.code == 0
        assert f"Example: unlearn eval {command}" in " ".join(outcome.out.split())
