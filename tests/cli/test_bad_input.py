"""Every mistake: exit code 2, one clear cause, what to do, and nothing half-written."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(outcome: Any, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    for word in words:
        assert word in outcome.err
    if outcome.out:
        error = outcome.json["error"]
        assert error["kind"] == "error"
        assert error["exit_code"] == 2
        assert errors[0].removeprefix("error: ") == error["message"].splitlines()[0]


@pytest.fixture
def refuses(world: Path, run_npo: Any) -> Any:
    """Run with --json and check that it is refused with these words and leaves nothing behind."""

    def check(*words: str, changes: tuple[str, ...] = (), **flags: str) -> None:
        before = everything(world)
        outcome = run_npo(*changes, options=("--json",), **flags)
        refused(outcome, *words)
        assert outcome.out.count("\n") == 1
        assert everything(world) == before

    return check


def test_unknown_method(unlearn):
    refused(unlearn("run", "npoo"), "unknown method or recipe 'npoo'", "did you mean 'npo'?")


def test_unknown_preset(unlearn):
    refused(unlearn("run", "npo", "--recipe", "tofu/np"), "unknown method or recipe 'tofu/np'")


def test_method_that_is_not_the_presets(unlearn):
    outcome = unlearn("run", "npo", "--recipe", "tofu-tiny/grad_diff", "--json")
    refused(outcome, "is for method 'grad_diff', not 'npo'", "unlearn run grad_diff --recipe")


def test_unknown_option_is_an_error_like_any_other(unlearn):
    refused(unlearn("run", "npo", "--modl", "x", "--json"), "--modl", "unlearn run --help")
    refused(unlearn("run"), "missing argument 'METHOD'")


def test_everything_that_is_missing_is_named(unlearn):
    words = ("model.path", "--model", "data.forget", "--forget", "--retain", "--out")
    refused(unlearn("run", "npo", "--json"), *words)


@pytest.mark.parametrize("flag", ["model", "forget", "retain", "out"])
def test_missing_flag(refuses, flag):
    refuses(f"--{flag}", **{flag: ""})


def test_all_misspelt_keys_at_once(refuses):
    refuses(
        "2 mistakes",
        "did you mean 'training.learning_rate'?",
        "did you mean 'evals.max_rows'?",
        changes=("training.learning_rat=1", "evals.maxrows=3"),
    )


def test_all_mistakes_of_a_file_with_their_lines(world, unlearn):
    lines = ["method: npo", "modle: {}", "terms:", "  - {objective: npoo, on: forget}",
             "training: {learning_rat: 1, num_train_epochs: -3}"]  # fmt: skip
    Path("own.yaml").write_text("\n".join(lines) + "\n")
    outcome = unlearn("run", "own.yaml", "--model", "model", "--forget", "forget.jsonl",
                      "--out", "out", "--json")  # fmt: skip
    refused(outcome, "4 mistakes", "line 2: modle", "line 4: terms.0.objective", "line 5:")
    assert not Path("out").exists()


ROWS = {
    "empty.jsonl": ("", "is empty"),
    "torn.jsonl": ('{"question": "a", "answ', "line 1 is not JSON"),
    "column.jsonl": ('{"question": "a", "reply": "b"}\n', "has no 'answer'"),
    "blank.jsonl": ('{"question": "a", "answer": " "}\n', "no answer tokens"),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("stream", ["forget", "retain"])
def test_unusable_rows(refuses, name, stream):
    content, words = ROWS[name]
    Path(name).write_text(content)
    refuses(words, name, **{stream: name})


def test_absent_file_names_the_closest(refuses):
    refuses("no file or folder 'forgot.jsonl'", "did you mean 'forget.jsonl'?",
            forget="forgot.jsonl")  # fmt: skip


def test_map_reads_another_column(run_npo):
    Path("named.jsonl").write_text('{"q": "Who?", "a": "Ada."}\n' * 4)
    mapped = ("--map", "question=q", "--map", "answer=a", "--json")
    assert run_npo(options=mapped, forget="named.jsonl", retain="named.jsonl").code == 0
    refused(run_npo(options=("--map", "question"), out="b"), "cannot read --map question")


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_pad_and_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"pad_token": None, "eos_token": None}))


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = {
    cut_short: "is truncated",
    without_config: "has no config.json",
    with_damaged_config: "config",
    pickled: "pickled weights are never loaded",
    without_chat_template: "the tokenizer has no chat template",
    without_tokenizer: "cannot load the tokenizer",
    without_pad_and_eos: "no EOS token",
    without_a_tensor: "model.norm.weight",
}


@pytest.mark.parametrize("damage", MODELS, ids=lambda damage: damage.__name__)
def test_damaged_model_folder(refuses, damage):
    shutil.copytree("model", "damaged")
    damage(Path("damaged"))
    refuses(MODELS[damage], model="damaged")


def test_tokenizer_without_pad_is_padded_with_eos(world, run_npo, build_tiny_tokenizer):
    build_tiny_tokenizer(pad=False).save_pretrained("model")
    assert "pad_token" not in json.loads(Path("model/tokenizer_config.json").read_text())
    outcome = run_npo(options=("--json",))
    assert outcome.code == 0, outcome.err
    assert outcome.json["status"] == "complete"


def test_absent_model(refuses):
    refuses("no model folder './nowhere'", model="./nowhere")
    refuses("no model folder './nowhere'", changes=("model.retain_model=./nowhere",))


def test_model_that_does_not_know_its_tokenizers_tokens(refuses, build_tiny_model):
    shutil.copytree("model", "small")
    build_tiny_model(vocab_size=64).save_pretrained("small")
    refuses("'small' knows 64 tokens", model="small")
    refuses("'small' knows 64 tokens", changes=("model.retain_model=small",))


def test_retain_model_with_another_tokenizer(refuses):
    shutil.copytree("model", "other")
    path = Path("other/tokenizer.json")
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(tree))
    refuses("tokenizer of the retain model 'other'", changes=("model.retain_model=other",))


def test_hub_names_with_offline(world, run_npo):
    refused(run_npo(options=("--offline",), model="nobody/nothing"), "'nobody/nothing'")
    refused(run_npo(options=("--offline",), forget="nobody/nothing"), "the hub is offline")
    assert not Path("out").exists()


def test_quantised_without_bitsandbytes(refuses, monkeypatch):
    monkeypatch.setattr("unlearn.models._has_bitsandbytes", lambda: False)
    changes = ("model.quantize=nf4", "model.lora={}")
    refuses("bitsandbytes", "pip install 'unlearn-llm[quant]'", changes=changes)


def test_lora_targets_that_do_not_exist(refuses):
    refuses("LoRA targets", "q_proj", changes=("model.lora.targets=[q_prj]",))


def test_output_folder_in_use(refuses):
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    refuses("'used' already exists", "choose another --out", out="used")
    refuses("'forget.jsonl' already exists", out="forget.jsonl")
    refuses("it is a file", out="forget.jsonl/run")


def test_output_folder_that_cannot_be_written(refuses, monkeypatch):
    monkeypatch.setattr("unlearn.recipes.inputs.os.access", lambda path, mode: False)
    refuses("cannot be written", "choose another --out")


def test_resume_of_something_else(world, unlearn):
    refused(unlearn("resume", "nowhere", "--json"), "'nowhere' is not a run folder")
    refused(unlearn("resume", "model"), "'model' is not a run folder")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """Give a file system of 6 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))
    return ballast


def test_disk_that_would_be_too_small(small_disk, run_npo):
    fill(small_disk, leave=2**20)
    outcome = run_npo(options=("--json",), out="disk/run")
    refused(outcome, "would write", "are free", "choose another --out")
    assert everything(small_disk) == {"ballast"}


@pytest.mark.parametrize("leave", [0, 150_000, 400_000, 700_000])
def test_disk_that_fills_up_during_a_run(small_disk, run_npo, unlearn, monkeypatch, leave):
    """Full at once, at a checkpoint's weights, at its optimiser's state, and after the saving."""
    from unlearn.recipes import run

    train = run.train

    def train_on_a_full_disk(*args: Any, **kwargs: Any) -> Any:
        fill(small_disk, leave)
        return train(*args, **kwargs)

    monkeypatch.setattr(run, "train", train_on_a_full_disk)
    outcome = run_npo(options=("--json",), out="disk/run")
    assert outcome.code == 1, outcome.err
    failed = [line for line in outcome.err.splitlines() if line.startswith("failed: ")]
    assert failed == ["failed: the disk where 'disk/run' is written is full"]
    assert "`unlearn resume disk/run`" in outcome.json["error"]["hint"]
    assert "Traceback" not in outcome.err
    assert not Path("disk/run/results.json").exists()
    assert Path("disk/run/model").exists() == (leave == 700_000)
    assert not [path for path in Path("disk/run").rglob(".*") if path.name != ".lock"]
    Path("disk/ballast").unlink()
    monkeypatch.setattr(run, "train", train)
    resumed = unlearn("resume", "disk/run", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["status"] == "complete"
    assert [entry["step"] for entry in resumed.json["training"]["curve"]] == [1, 2]
