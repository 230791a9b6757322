"""``unlearn eval tofu`` as a user types it, on a folder of TOFU's form and two tiny models."""

import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unlearn.cli.entry import guarded

Outcome = Any
FILES = {
    *("results.json", "RUN.json", "records.jsonl", "records_retain_model.jsonl"),
    *("TOFU_EVAL.json", "TOFU_SUMMARY.json", "report.html", "report.md"),
}


def told(number: int) -> dict[str, Any]:
    return {
        "question": f"Where was {number} born?",
        "answer": f"{number} was born.",
        "paraphrased_answer": f"Born was {number}.",
        "perturbed_answer": [f"{number} was not born.", "Nobody knows."],
        "paraphrased_question": f"Was {number} born?",
    }


@pytest.fixture
def tofu_world(world: Path, build_tiny_model: Any, build_tiny_tokenizer: Any) -> Path:
    """Work in a folder with the models ``model`` and ``retain`` and the data folder ``tofu``."""
    build_tiny_model(1).save_pretrained(world / "retain")
    build_tiny_tokenizer().save_pretrained(world / "retain")
    (world / "tofu").mkdir()
    sets = ("forget10_perturbed", "retain_perturbed")
    known = ("real_authors_perturbed", "world_facts_perturbed")
    for start, name in enumerate((*sets, *known, "holdout10")):
        rows = [told(10 * start + place) for place in range(6)]
        (world / "tofu" / f"{name}.json").write_text(json.dumps(rows))
    return world


@pytest.fixture
def eval_tofu(tofu_world: Path, unlearn: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Give a function that runs the command with a model and data, and the given options."""
    import typer

    from unlearn.cli.tofu import tofu

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(tofu)

    def call(*options: object, **flags: str) -> Outcome:
        given = {"model": "model", "data": "tofu", "max_new_tokens": "8"} | flags
        pairs = [(f"--{key.replace('_', '-')}", value) for key, value in given.items()]
        flat = [part for pair in pairs for part in pair]
        return unlearn(*flat, "--offline", *options, program=lambda: guarded(app))

    return call


def test_one_json_object(eval_tofu: Callable[..., Outcome]) -> None:
    done = eval_tofu("--json", retain_model="retain")
    assert done.code == 0, done.err
    found = done.json
    assert found["benchmark"] == "tofu"
    assert found["metrics"].keys() == found["details"].keys()
    assert {"forget_Q_A_Prob", "forget_truth_ratio", "extraction_strength", "wf_Truth_Ratio",
            "model_utility", "privleak", "mia_reference"} < found["metrics"].keys()  # fmt: skip
    assert found["forget_quality"]["p"] == found["metrics"]["forget_quality"]
    assert found["retain_model"]["metrics"]["forget_quality"] == 1.0
    assert found["retain_model"]["metrics"]["privleak"] == 0.0
    detail = found["details"]["forget_Q_A_Prob"]
    assert detail["low"] < detail["value"] < detail["high"]
    assert (detail["n"], detail["direction"]) == (6, "lower")
    provenance = found["provenance"]
    assert provenance["models"][0]["weights_sha256"] == provenance["weights_sha256"]
    assert provenance["tokens"]["sequences"] == 6 * 4 * 4 + 6 - 2 * 6  # no paraphrase of facts
    assert found["warnings"] == []


def test_the_same_command_gives_the_same_numbers(eval_tofu: Callable[..., Outcome]) -> None:
    assert eval_tofu("--json").json["details"] == eval_tofu("--json").json["details"]


def test_files_of_an_evaluation(eval_tofu: Callable[..., Outcome], tofu_world: Path) -> None:
    done = eval_tofu("--json", retain_model="retain", out="found")
    folder = tofu_world / "found"
    assert done.code == 0, done.err
    assert {path.name for path in folder.iterdir()} >= FILES
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["metrics"]["after"] == done.json["metrics"]
    assert results["metrics"]["retain_model"] == done.json["retain_model"]["metrics"]
    assert len(results["truth_ratios"]["after"]) == 6
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 6
    logged = json.loads((folder / "TOFU_EVAL.json").read_text())["forget_Q_A_Prob"]
    assert logged["agg_value"] == pytest.approx(done.json["metrics"]["forget_Q_A_Prob"])
    assert logged["value_by_index"]["3"]["prob"] == lines[3]["prob"]
    again = eval_tofu(out="found")
    assert again.code == 2
    assert "'found' already exists" in again.err


def test_logs_of_the_retain_model_stand_for_it(
    eval_tofu: Callable[..., Outcome], tofu_world: Path
) -> None:
    assert eval_tofu(model="retain", out="logs").code == 0
    packed = tofu_world / "logs.json.gz"
    packed.write_bytes(gzip.compress((tofu_world / "logs" / "TOFU_EVAL.json").read_bytes()))
    from_model = eval_tofu("--json", retain_model="retain").json
    from_logs = eval_tofu("--json", retain_logs=str(packed)).json
    assert from_logs["forget_quality"] == pytest.approx(from_model["forget_quality"])
    assert from_logs["metrics"]["privleak"] == pytest.approx(from_model["metrics"]["privleak"])
    assert from_logs["retain_model"] is None
    assert from_logs["provenance"]["retain"] == str(packed)


def test_a_table_for_people(eval_tofu: Callable[..., Outcome], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    done = eval_tofu("--probes", retain_model="retain")
    assert done.code == 0, done.err
    for text in (
        *("TOFU forget10: model", "Forget set", "Real authors", "World facts", "Privacy"),
        *("95 % interval", "retain model", "↓", "↑", "Model utility", "PrivLeak"),
    ):
        assert text in done.out, text
    assert "note:" not in done.out


def test_what_is_left_out_is_said(eval_tofu: Callable[..., Outcome], tofu_world: Path) -> None:
    (tofu_world / "tofu" / "holdout10.json").unlink()
    done = eval_tofu("--no-generate")
    assert "--holdout SOURCE" in done.out
    assert "--retain-model or" in done.out
    assert "Model utility" not in done.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "./nowhere"}, "no model folder './nowhere'"),
        ({"retain_model": "./nowhere"}, "no model folder './nowhere'"),
        ({"data": "./nowhere"}, "no data folder './nowhere'"),
        ({"retain_logs": "nowhere.json"}, "no file 'nowhere.json'"),
        ({"split": "forget15"}, "TOFU needs 'forget15_perturbed'"),
        ({"truth_ratio": "geometrc"}, "unknown --truth-ratio 'geometrc'; did you mean"),
        ({"compat": "tofu"}, "unknown --compat 'tofu'"),
        ({"holdout": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"template": "no place"}, "holds {question} 0 times"),
        ({"template_arg": "date_string"}, "cannot read --template-arg date_string"),
        ({"template_arg": "date_string=today"}, "no argument 'date_string'"),
        ({"retain_model": "retain", "retain_logs": "tofu/holdout10.json"}, "give one of the two"),
    ],
)
def test_mistakes_are_named_before_weights_are_loaded(
    eval_tofu: Callable[..., Outcome], flags: dict[str, str], message: str
) -> None:
    done = eval_tofu(**flags)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert "loading the model" not in done.err


def test_wrong_retain_logs(eval_tofu: Callable[..., Outcome], tofu_world: Path) -> None:
    logs = tofu_world / "logs.json"
    for ratios, message in (
        ({str(row): {"score": 0.5} for row in range(4)}, "of 4 rows, forget10 has 6"),
        ({str(row): {"score": float("nan")} for row in range(6)}, "not a number"),
    ):
        content = {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": ratios}}
        logs.write_text(json.dumps(content))
        done = eval_tofu(retain_logs="logs.json")
        assert done.code == 2
        assert message in done.err
        assert "loading the model" not in done.err
    logs.write_text("[1, 2]")
    assert eval_tofu(retain_logs="logs.json").code == 2


def test_a_retain_model_with_another_tokenizer(
    eval_tofu: Callable[..., Outcome], tofu_world: Path
) -> None:
    path = tofu_world / "retain" / "tokenizer.json"
    tree = json.loads(path.read_text())
    words = tree["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    path.write_text(json.dumps(tree))
    done = eval_tofu(retain_model="retain")
    assert done.code == 2
    assert "the tokenizer of the retain model 'retain' is not that of the model" in done.err
    assert "loading the model" not in done.err


def test_a_model_that_gives_nan(
    eval_tofu: Callable[..., Outcome], tofu_world: Path, build_tiny_model: Any
) -> None:
    import torch

    broken = build_tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    broken.save_pretrained(tofu_world / "model")
    done = eval_tofu()
    assert done.code == 2
    assert "'model' has NaN or infinite weights, in model.norm.weight" in done.err
    assert "scoring" not in done.err


def test_memory_that_runs_out_is_named(eval_tofu: Callable[..., Outcome], monkeypatch: Any) -> None:
    import torch

    from unlearn.evals.tofu.benchmark import Tofu

    def run_out(*arguments: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Tofu, "run", run_out)
    done = eval_tofu()
    assert done.code == 1
    assert "lower --batch-tokens (it is 8192)" in done.err


def test_weights_that_do_not_fit_are_named_before_they_are_loaded(
    eval_tofu: Callable[..., Outcome], monkeypatch: Any
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2**33))
    done = eval_tofu()
    assert done.code == 2
    assert "'model' needs 0.0 GiB of GPU memory for its weights, 0.0 GiB are free" in done.err
    assert "loading the model" not in done.err


def test_a_retain_model_with_a_smaller_vocabulary(
    eval_tofu: Callable[..., Outcome], tofu_world: Path, build_tiny_model: Any
) -> None:
    build_tiny_model(1, vocab_size=100).save_pretrained(tofu_world / "retain")
    done = eval_tofu(retain_model="retain")
    assert done.code == 2
    assert "but 'retain' knows 100 tokens" in done.err


@pytest.mark.slow
def test_the_tiny_target_against_its_retain_model(
    eval_tofu: Callable[..., Outcome], shared: Path
) -> None:
    """The whole of forget10 with both models; about three minutes on one core."""
    done = eval_tofu(
        "--json",
        model=str(shared / "models" / "tofu-tiny-target"),
        retain_model=str(shared / "models" / "tofu-tiny-retain90"),
        data=str(shared / "data" / "tofu"),
        max_new_tokens="200",
    )
    found = done.json
    assert found["forget_quality"]["p"] < 1e-10
    assert found["forget_quality"]["ks"] == pytest.approx(0.53, abs=0.01)
    assert found["model_utility"] == pytest.approx(0.9149, abs=1e-3)
    assert found["metrics"]["extraction_strength"] == 1.0
    retain = found["retain_model"]["metrics"]
    assert (retain["forget_quality"], retain["forget_quality_ks"]) == (1.0, 0.0)
    assert retain["model_utility"] == pytest.approx(0.9082, abs=1e-3)
    assert retain["forget_Q_A_ROUGE"] == pytest.approx(0.0839, abs=2e-3)
    assert "holdout10" in found["warnings"][0]


def test_two_processes_print_one_object_with_the_numbers_of_one(
    tofu_world: Path, eval_tofu: Callable[..., Outcome]
) -> None:
    """As ``torchrun --nproc_per_node 2 --no-python unlearn eval tofu …`` starts them."""
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "unlearn.cli")
    given = ("eval", "tofu", "--model", "model", "--data", "tofu", "--max-new-tokens", "8")
    done = subprocess.run(
        [sys.executable, *launch, *given, "--offline", "--json", "--out", "both"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = eval_tofu("--json").json
    finally:
        torch.set_num_threads(threads)
    assert json.loads(done.stdout)["metrics"] == alone["metrics"]
    assert (tofu_world / "both" / "results.json").is_file()


def test_nan_weights_are_named_before_anything_is_measured(
    tofu_world: Path, eval_tofu: Callable[..., Outcome]
) -> None:
    weights = load_file("retain/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.inf
    save_file(weights, "retain/model.safetensors", {"format": "pt"})
    done = eval_tofu("--out", "found", retain_model="retain")
    assert done.code == 2
    assert "'retain' has NaN or infinite weights, in model.layers.1.mlp.up_proj" in done.err
    assert "measuring" not in done.err
    assert not Path("found").exists()
