"""``unlearn sae select``: features shown with what they fire on, and taken up by a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.sae.dictionary import Dictionary
from unlearn.sae.hook import Hook
from unlearn.sae.storage import save_dictionary


@pytest.fixture
def choose(world: Path, unlearn: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that chooses features of a random dictionary of the first layer."""
    torch.manual_seed(0)
    w = torch.randn(32, 64) * 0.3
    made = Dictionary(
        "jumprelu", w, torch.zeros(64), w.t().contiguous(), torch.zeros(32),
        torch.full((64,), 0.02), hook=Hook(0),
    )  # fmt: skip
    save_dictionary(made, world / "d.safetensors")

    def call(*words: object) -> Any:
        sets = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")
        return unlearn("sae", "select", "model", "--dictionary", "d.safetensors", *sets,
                       "--features", 4, "--tau", 1.0, *words)  # fmt: skip

    return call


def test_features_are_shown_written_and_taken_up_by_a_run(
    choose: Callable[..., Any], unlearn: Callable[..., Any]
) -> None:
    shown = choose("--out", "features.json")
    assert shown.code == 0, shown.err
    assert "4 features of layer 0 that fire on less than 1 of the retain tokens" in shown.out
    assert "«" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    found = json.loads(Path("features.json").read_text())
    ids = [one["id"] for one in found["dictionaries"][0]["features"]]
    assert len(ids) == 4
    veto = choose("--exclude", ids[0], "--json")
    again = [one["id"] for one in veto.json["dictionaries"][0]["features"]]
    assert again[:3] == ids[1:]
    found["dictionaries"][0]["features"].pop(1)  # a person may take one out
    Path("features.json").write_text(json.dumps(found))
    done = unlearn(
        "run", "sae", "--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl",
        "--set", "edit.dictionary=d.safetensors", "--set", "edit.selected=features.json",
        "--set", "edit.c=2x", "--set", "edit.retain_kl=null", "--set", "edit.features=20",
        "--set", "edit.tau=0.01", "--set", "evals.generate=false", "--out", "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    taken = done.json["training"]["clamp"]["dictionaries"][0]["features"]
    assert [one["id"] for one in taken] == [ids[0], *ids[2:]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "forget.jsonl"), "'forget.jsonl' already exists"),
        (("--exclude", 64), "feature 64 given, but the dictionary has 64"),
        (("--layer", 1), "belongs to blocks.0.hook_resid_post, not to the output of layer 1"),
        (("--tau", 0.0), "no latent fires on the forget set and on less than tau=0"),
    ],
)
def test_mistakes_are_one_line(choose: Callable[..., Any], words: Any, message: str) -> None:
    failed = choose(*words)
    assert failed.code == 2
    assert message in " ".join(failed.err.split())
    assert "Traceback" not in failed.err
