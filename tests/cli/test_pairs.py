"""The methods on pairs of answers and ``data alternates``, from the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import settings

GIVEN = ("--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl", "--out", "out")


@pytest.mark.parametrize("method", ["idk_dpo", "idk_nll", "idk_ap"])
def test_a_run_with_refusals(method: str, world: Path, unlearn: Callable[..., Any]) -> None:
    Path("refusals.txt").write_text("I do not know.\nNo idea.\n")
    done = unlearn("run", method, *GIVEN, *settings("data.refusals=refusals.txt"), "--json")
    assert done.code == 0, done.err
    assert done.json["provenance"]["refusal"]["source"] == "refusals.txt"
    again = unlearn("run", "out/recipe.yaml", "--out", "again", "--json")
    assert again.code == 0, again.err
    assert again.json["metrics"] == done.json["metrics"]


def test_alternates_are_written_and_then_preferred(
    world: Path, unlearn: Callable[..., Any], build_tiny_model: Any
) -> None:
    build_tiny_model(max_position_embeddings=1024).save_pretrained("model")
    few = ("--samples", 2, "--max-new-tokens", 5)
    done = unlearn(
        "data", "alternates", "forget.jsonl", "--model", "model", "--out", "alt.jsonl", *few,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["rows"] == 12
    given = [part if part != "forget.jsonl" else "alt.jsonl" for part in GIVEN]
    ran = unlearn("run", "altpo", *given, *settings(), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["provenance"]["alternate"]["source"] == "alt.jsonl"
    assert (
        "12 rows"
        in unlearn(
            "data", "alternates", "forget.jsonl", "--model", "model", "--out", "b.jsonl", *few
        ).out
    )


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("altpo", "seed=0", "row 1 of 'forget.jsonl' has no 'alternate'"),
        ("idk_dpo", "data.refusals=empty.txt", "'empty.txt' is empty (0 bytes)"),
        ("idk_dpo", "data.refusals=none.txt", "no file of refusals 'none.txt'"),
        ("npo", "terms.forget.rejected=refusal", "npo takes no pair"),
        ("idk_dpo", "terms.forget.rejected=null", "dpo compares two answers and needs 'rejected'"),
    ],
)
def test_one_line_each_before_any_work(
    method: str, change: str, message: str, world: Path, unlearn: Callable[..., Any]
) -> None:
    Path("empty.txt").write_text("")
    done = unlearn("run", method, *GIVEN, "--set", change)
    assert done.code == 2
    lines = [line for line in done.err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path("out").exists()


def test_a_ladder_of_one_model_is_refused(world: Path, unlearn: Callable[..., Any]) -> None:
    shutil.copytree("model", "copy")
    for other, words in (("./model", "given as both"), ("copy", "hold the same weights")):
        done = unlearn("data", "ladder", "forget.jsonl", "--chosen-model", "model",
                       "--rejected-model", other, "--out", "delta")  # fmt: skip
        assert done.code == 2
        assert words in done.err
        assert not Path("delta").exists()
