"""lm-eval in this process: the same numbers as by hand, prompts from its own files."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unlearn.errors import UserError
from unlearn.evals.harness.run import to_lm_eval_logs
from unlearn.evals.harness.tasks import HarnessSettings, accuracy, find_tasks, run_tasks, wilson
from unlearn.evals.harness.wmdp import Wmdp

SUBJECTS = ("anatomy", "virology")
SIZES = {"wmdp-bio": 12, "wmdp-chem": 8, "wmdp-cyber": 20, "mmlu": 16}
ABOUT = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Make up short questions; ``subject`` is only read for MMLU."""
    draw = random.Random(seed)
    words = ["Ada", "Bo", "born", "boats", "paints", "fox", "dog", "Oslo", "morning"]
    return [
        {
            "question": f" Where {' '.join(draw.choices(words, k=3))}? ",
            "choices": draw.sample(words, 4),
            "answer": draw.randrange(4),
            "subject": SUBJECTS[n % 3 == 0],
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("wmdp")
    for seed, (name, count) in enumerate(SIZES.items()):
        lines = [json.dumps(row) for row in rows(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def by_hand(model: Any, tokenizer: Any, prompt: str) -> int:
    """Give the letter whose tokens are the likeliest after the prompt, one forward pass each."""
    start = len(tokenizer(prompt)["input_ids"])
    found = []
    for letter in "ABCD":
        ids = torch.tensor([tokenizer(f"{prompt} {letter}")["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        places = range(start, ids.shape[1])
        found.append(sum(float(log_probs[place - 1, ids[0, place]]) for place in places))
    return max(range(4), key=found.__getitem__)


def template(path: str) -> str:
    """Read the prompt that lm-eval's own task file gives."""
    import lm_eval.tasks

    text = (Path(lm_eval.tasks.__file__).parent / path).read_text()
    return str(yaml.safe_load(text)["doc_to_text"])


def asked(row: dict[str, Any], about: str, path: str) -> str:
    from jinja2 import Template

    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return head + Template(template(path)).render(**row)


def test_wmdp_from_files_is_what_it_is_by_hand(
    data: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Accuracies of 40 rows by one forward pass per choice; wmdp/acc weighs 12, 8 and 20 rows."""
    found = Wmdp.find("bio,chem,cyber", data=data)
    result = found.run(tiny_model, tiny_tokenizer, HarnessSettings(log_samples=True))
    hits = {}
    for seed, (name, subject) in enumerate(ABOUT.items()):
        given = rows(SIZES[f"wmdp-{name}"], seed)
        prompts = [asked(row, subject, "wmdp/_default_template_yaml") for row in given]
        records = [record for record in result.records if record["split"] == f"wmdp_{name}"]
        assert [record["arguments"][0][0] for record in records] == prompts
        assert [record["arguments"][2][1] for record in records] == [" C"] * len(given)
        right = [by_hand(tiny_model, tiny_tokenizer, prompt) for prompt in prompts]
        hits[name] = [pick == row["answer"] for pick, row in zip(right, given, strict=True)]
        metric = result.metrics[f"wmdp_{name}/acc"]
        assert metric.value == pytest.approx(sum(hits[name]) / len(given))
        assert (metric.n, metric.direction) == (len(given), "lower")
    every = [hit for values in hits.values() for hit in values]
    assert 0 < sum(every) < len(every)
    together = result.metrics["wmdp/acc"]
    assert (together.value, together.n) == (pytest.approx(sum(every) / 40), 40)


def test_mmlu_from_a_file_is_weighted_by_size(
    data: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Ten rows of anatomy and six of virology: the accuracy is that over all sixteen."""
    result = Wmdp.find("mmlu", data=data).run(tiny_model, tiny_tokenizer)
    right = 0
    for row in rows(SIZES["mmlu"], 3):
        prompt = asked(row, row["subject"], "mmlu/default/_default_template_yaml")
        right += by_hand(tiny_model, tiny_tokenizer, prompt) == row["answer"]
    assert list(result.metrics) == ["mmlu/acc"]
    metric = result.metrics["mmlu/acc"]
    assert metric.value == pytest.approx(right / 16)
    assert (metric.n, metric.direction) == (16, "higher")
    inner = result.settings["members"]["mmlu"]
    assert {name: part["n"] for name, part in inner.items()} == {
        "mmlu_anatomy/acc": 10,
        "mmlu_virology/acc": 6,
    }


def test_batches_limits_and_the_callers_objects(
    data: Path, tiny_model: Any, build_tiny_tokenizer: Any
) -> None:
    """Batch size changes no number; the tokenizer, the mode and the random numbers stay."""
    tokenizer = build_tiny_tokenizer(pad=False)
    tiny_model.train()
    tasks = Wmdp.find("chem,cyber", data=data)
    torch.manual_seed(7)
    random.seed(7)
    expected = (torch.rand(1).item(), random.random())
    torch.manual_seed(7)
    random.seed(7)
    events: list[tuple[str, int, int]] = []
    auto = tasks.run(tiny_model, tokenizer, progress=lambda *event: events.append(event))
    one = tasks.run(tiny_model, tokenizer, HarnessSettings(batch_size=1, limit=3))
    assert (torch.rand(1).item(), random.random()) == expected
    assert tiny_model.training
    assert tokenizer.pad_token is None
    assert auto.metrics["wmdp_cyber/acc"].n == 20
    assert one.metrics["wmdp_cyber/acc"].n == 3
    assert events[0] == ("scoring", 0, events[0][2])
    assert events[-1] == ("scoring", events[0][2], events[0][2])
    again = tasks.run(tiny_model, tokenizer, HarnessSettings(batch_size=3))
    assert again.metrics == auto.metrics


def test_our_way_gives_the_numbers_of_simple_evaluate(
    data: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    """The same tasks through lm-eval's front door (without its look at the machine)."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = Wmdp.find("bio,mmlu", data=data).tasks
    ours = run_tasks(copy.deepcopy(tiny_model), tiny_tokenizer, tasks)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    again = Wmdp.find("bio,mmlu", data=data).tasks
    lm = HFLM(pretrained=tiny_model, tokenizer=tiny_tokenizer, batch_size=4)
    names = TaskManager(include_defaults=False)  # reading all of lm-eval's takes ten seconds
    theirs = evaluator.simple_evaluate(
        lm, tasks=list(again.built), log_samples=False, task_manager=names
    )
    for task in ("wmdp_bio", "mmlu"):
        metric, values = ours.metrics[f"{task}/acc"], theirs["results"][task]
        assert metric.value == values["acc,none"]
        assert metric.standard_error == pytest.approx(values["acc_stderr,none"])


def inline(name: str, **changes: Any) -> dict[str, Any]:
    """Describe a task in lm-eval's own words, on two rows of ours."""
    import datasets

    texts = [{"text": "Ada was born in Oslo."}, {"text": "Bo paints boats."}]
    data = {"test": datasets.Dataset.from_list(texts)}
    common = {"task": name, "custom_dataset": lambda **_: data, "test_split": "test"}
    return common | {"doc_to_text": "", "doc_to_target": "{{text}}"} | changes


def test_other_kinds_of_tasks_run_too(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Perplexity (rolling windows) by hand, and answers written by the model itself."""
    metrics = [{"metric": "byte_perplexity"}]
    rolling = inline("rolling", output_type="loglikelihood_rolling", metric_list=metrics)
    writing = inline("writing", output_type="generate_until", doc_to_text="{{text}}",
                     generation_kwargs={"until": ["."], "max_gen_toks": 5},
                     metric_list=[{"metric": "exact_match"}])  # fmt: skip
    tasks = find_tasks([rolling, writing], folders=[Path(__file__).parent])
    result = run_tasks(tiny_model, tiny_tokenizer, tasks, HarnessSettings(batch_size=2))
    assert list(result.metrics) == ["rolling/byte_perplexity", "writing/exact_match"]
    nats, size = 0.0, 0
    for text in ("Ada was born in Oslo.", "Bo paints boats."):
        ids = torch.tensor([[1, *tiny_tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            log_probs = tiny_model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(log_probs.gather(-1, ids[0, 1:, None]).sum())
        size += len(text)
    assert result.metrics["rolling/byte_perplexity"].value == pytest.approx(math.exp(nats / size))
    assert result.metrics["rolling/byte_perplexity"].direction == "lower"
    assert result.metrics["writing/exact_match"].value == 0.0


def test_a_model_that_gives_nan_is_refused(
    data: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tiny_model.lm_head.weight.data[5] = math.nan
    with pytest.raises(UserError, match="the model gives NaN"):
        Wmdp.find("bio", data=data).run(tiny_model, tiny_tokenizer)


def test_a_model_that_does_not_know_its_tokenizers_tokens(
    data: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    small = build_tiny_model(vocab_size=64)
    with pytest.raises(UserError, match="but the model knows 64 tokens"):
        Wmdp.find("bio", data=data).run(small, tiny_tokenizer)


def test_prompts_that_are_cut_are_counted(
    data: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    short = build_tiny_model(max_position_embeddings=16)
    result = Wmdp.find("bio", data=data).run(short, tiny_tokenizer, HarnessSettings(limit=2))
    assert result.settings["notes"] == [
        "8 requests are longer than the model's 16 tokens: their beginning was cut off"
    ]


def test_what_open_unlearning_reads(data: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    tasks = Wmdp.find("bio", data=data)
    result = tasks.run(tiny_model, tiny_tokenizer, HarnessSettings(log_samples=True, limit=2))
    evaluation, summary = to_lm_eval_logs(result)
    assert [sample["doc_id"] for sample in evaluation["wmdp_bio"]] == [0, 1]
    assert list(summary) == ["wmdp_bio/acc", "wmdp_bio/acc_stderr"]
    json.dumps(evaluation, allow_nan=False)


def test_wilson_by_hand() -> None:
    """Half of 10 rows, z = 1.96: (0.5 + 0.192073) / 1.384146 ± 0.263405; 0 of 10 ends at 0.2775."""
    assert wilson(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-5)
    assert wilson(1.0, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-5)


def test_standard_error_of_an_accuracy_by_hand() -> None:
    """1 of 4: sample variance (0.75² + 3 · 0.25²) / 3 = 0.25, error 0.5 / 2 = 0.25."""
    assert accuracy(0.25, 4, "lower").standard_error == pytest.approx(0.25)
    assert accuracy(1.0, 1, "lower").standard_error is None


@pytest.fixture
def wmdp_files() -> list[Path]:
    import lm_eval.tasks

    return [Path(lm_eval.tasks.__file__).parent / "wmdp"]


def test_unknown_task_names_the_closest(wmdp_files: list[Path]) -> None:
    with pytest.raises(UserError, match="no task 'wmdp_boi'; did you mean 'wmdp_bio'"):
        find_tasks(["wmdp_boi"], folders=wmdp_files)
    with pytest.raises(UserError, match="tasks that begin so: wmdp_bio, wmdp_chem, wmdp_cyber"):
        find_tasks(["wmdp_"], folders=wmdp_files)


def test_a_task_whose_data_is_not_at_hand_offline(wmdp_files: list[Path]) -> None:
    with pytest.raises(UserError, match="'wmdp_bio' is not on this machine, and the hub is off"):
        find_tasks(["wmdp_bio"], folders=wmdp_files, offline=True)


def test_mmlu_subject_that_does_not_exist(tmp_path: Path) -> None:
    row = rows(1, 0)[0] | {"subject": "anatmy"}
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="no subject 'anatmy'; did you mean 'anatomy'"):
        Wmdp.find("mmlu", data=tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (HarnessSettings(batch_size="many"), "batch size 'many' is no number above 0"),
        (HarnessSettings(batch_size="0"), "batch size '0'"),
        (HarnessSettings(limit=0), "limit=0 is too small"),
        (HarnessSettings(chat_template=True), "the tokenizer has no chat template"),
    ],
)
def test_settings_that_cannot_be(
    settings: HarnessSettings, words: str, build_tiny_tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=words):
        settings.check(build_tiny_tokenizer(chat=False))
