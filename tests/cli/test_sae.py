"""``unlearn sae``: trained from the command line, looked at, measured; mistakes named early."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unlearn.sae.storage import load_dictionary

SETTINGS = ("--set", "batch=32", "--set", "buffer=128", "--set", "context=24")


@pytest.fixture
def train(world: Path, unlearn: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that trains a small dictionary on 40 rows."""
    rows = ({"text": f"Person {n} was born in town {n * 7} and paints boats."} for n in range(40))
    (world / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*words: object, out: str = "sae", steps: int = 6) -> Any:
        given = ("--data", "texts.jsonl", "--layer", 0, "--features", 40, "--k", 4)
        return unlearn("sae", "train", "model", *given, "--steps", steps, "--out", out,
                       *SETTINGS, *words)  # fmt: skip

    return call


def test_a_dictionary_is_trained_kept_and_looked_at(
    train: Callable[..., Any], unlearn: Callable[..., Any]
) -> None:
    done = train("--json", "--kind", "batchtopk")
    assert done.code == 0, done.err
    found = done.json
    assert (found["kind"], found["trained_as"]) == ("jumprelu", "batchtopk")
    assert (found["width"], found["features"], found["layer"]) == (32, 40, 0)
    assert found["metrics"]["variance_explained"] <= 1
    assert "training the dictionary" in done.err
    assert "step 6/6" in done.err
    names = sorted(path.name for path in Path("sae").iterdir())
    assert names == ["events.jsonl", "results.json", "sae.safetensors"]
    assert json.loads(Path("sae/results.json").read_text())["metrics"] == found["metrics"]
    seen = unlearn("sae", "inspect", "sae")
    assert seen.code == 0, seen.err
    assert "40 features of width 32" in seen.out
    assert "jumprelu, trained as batchtopk" in seen.out
    assert max(map(len, seen.out.splitlines())) <= 80
    written = unlearn("sae", "export", "sae", "--format", "saelens", "--out", "lens", "--json")
    assert written.code == 0, written.err
    assert (written.json["format"], written.json["hook"]) == ("SAELens", "blocks.0.hook_resid_post")
    assert unlearn("sae", "export", "sae", "--out", "lens").code == 2
    measured = unlearn("sae", "inspect", "sae", "--model", "model", "--data", "texts.jsonl",
                       "--json")  # fmt: skip
    assert measured.code == 0, measured.err
    assert measured.json["layer"] == 0
    assert measured.json["metrics"]["tokens"] > 100


def test_a_recipe_file_says_what_options_say(train: Callable[..., Any]) -> None:
    Path("sae.yaml").write_text("kind: gated\nset: [sparsity=0.5]\nseed: 3\n")
    assert train("--recipe", "sae.yaml", out="a", steps=3).code == 0
    settings = load_dictionary("a").about["settings"]
    # options of the command line come first: they replace those of the file, --set too
    assert (settings["kind"], settings["seed"], settings["batch"]) == ("gated", 3, 32)


def test_a_stopped_training_is_saved_and_goes_on_with_the_same_command(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 5, which is finished and saved although only each fourth would be."""
    from unlearn.sae.train import Training

    whole = train("--set", "save_steps=4", "--set", "eval_steps=3", out="whole", steps=6)
    assert whole.code == 0, whole.err
    assert "after step 3" in whole.err
    before, count = Training.step, []

    def stopping(self: Training) -> None:
        count.append(1)
        if len(count) == 5:
            signal.raise_signal(signal.SIGTERM)
        before(self)

    monkeypatch.setattr(Training, "step", stopping)
    stopped = train("--set", "save_steps=4", out="stopped", steps=6)
    assert stopped.code == 75
    assert "stopped on request after step 5" in stopped.err
    assert "the same command goes on from what was last saved in 'stopped'" in stopped.err
    assert not Path("stopped/results.json").exists()
    resumed = train("--set", "save_steps=4", out="stopped", steps=6)
    assert resumed.code == 0, resumed.err
    assert len(count) == 6
    assert "going on after step 5" in resumed.err
    first, second = (load_file(f"{name}/sae.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not Path("stopped/training.safetensors").exists()


def test_several_processes_are_started_by_the_command(train: Callable[..., Any]) -> None:
    """With --nproc 2 the command speaks once, and writes what one process does (but rounding)."""
    alone = train(out="alone", steps=3)
    assert alone.code == 0, alone.err
    done = train("--nproc", 2, out="both", steps=3)
    assert done.code == 0, done.err
    first, second = (load_file(f"{name}/sae.safetensors") for name in ("alone", "both"))
    for name, one in first.items():
        torch.testing.assert_close(second[name], one, rtol=2e-3, atol=2e-4, msg=name)
    events = [json.loads(line) for line in Path("both/events.jsonl").read_text().splitlines()]
    assert [one["step"] for one in events if one["event"] == "learnt"] == [3]
    finished = train("--nproc", 2, out="both")
    assert finished.code == 2
    assert "'both' holds a finished training" in finished.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "btach=3", "--set", "lr=-1"), "unknown setting 'btach'; did you mean 'batch'?"),
        (("--set", "btach=3", "--set", "lr=-1"), "lr is -1"),
        (("--set", "lr"), "write KEY=VALUE"),
        (("--layer", 2), "layer=2 given, but 'model' has 2 layers"),
        (("--k", 41), "k=41 given for 40 features"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--kind", "transformer"), "transformer"),
        (("--out", "model"), "output folder 'model' already exists"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    words: tuple[object, ...], message: str, train: Callable[..., Any]
) -> None:
    done = train(*words)
    assert done.code == 2
    assert message in done.err
    assert not Path("sae").exists()


def test_a_finished_training_is_not_written_over(train: Callable[..., Any]) -> None:
    assert train(steps=2).code == 0
    again = train(steps=2)
    assert again.code == 2
    assert "'sae' holds a finished training" in again.err


def test_dictionaries_that_do_not_fit_the_model_are_refused(
    train: Callable[..., Any], unlearn: Callable[..., Any], world: Path
) -> None:
    assert train(steps=2).code == 0
    on = ("--model", "model", "--data", "texts.jsonl")
    other = unlearn("sae", "inspect", "sae", *on, "--layer", 1)
    assert other.code == 2
    assert "belongs to blocks.0.hook_resid_post, not to the output of layer 1" in other.err
    wide = world / "layer_1" / "width_16k" / "average_l0_9"
    wide.mkdir(parents=True)
    weights = {"W_enc": (7, 20), "W_dec": (20, 7), "b_enc": 20, "b_dec": 7, "threshold": 20}
    np.savez(wide / "params.npz", **{name: np.ones(size, np.float32) for name, size in
                                     weights.items()})  # fmt: skip
    seen = unlearn("sae", "inspect", wide)
    assert "jumprelu (Gemma Scope format)" in seen.out
    refused = unlearn("sae", "inspect", wide, *on)
    assert refused.code == 2
    assert "width 7, the model's have 32" in refused.err
    assert unlearn("sae", "inspect", "sae", "--model", "model").code == 2
    missing = unlearn("sae", "inspect", "nowhere")
    assert missing.code == 2
    assert "no dictionary 'nowhere'" in missing.err
