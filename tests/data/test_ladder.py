"""Pairs by two models: one model twice is refused, and what left no pair is said in words."""

import shutil
from pathlib import Path

import pytest

from unlearn.data.ladder import EMPTY, ENDLESS, SAME, check_different, no_pair_left
from unlearn.errors import UserError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Write two folders of equally long weights that differ in their last byte."""
    for name, last in (("large", b"1"), ("small", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights" + last)
    return tmp_path


def test_two_models_pass(models: Path) -> None:
    check_different(str(models / "large"), str(models / "small"))
    check_different("owner/large", "owner/small")


def test_one_model_twice(models: Path) -> None:
    with pytest.raises(UserError, match="'owner/one' is given as both"):
        check_different("owner/one", "owner/one")
    with pytest.raises(UserError, match="is given as both"):
        check_different(str(models / "large"), f"{models}/small/../large")


def test_a_copy_of_a_model(models: Path) -> None:
    shutil.copytree(models / "large", models / "copy")
    with pytest.raises(UserError, match="hold the same weights"):
        check_different(str(models / "large"), str(models / "copy"))


def test_the_same_adapter_on_two_bases_is_two_models(models: Path) -> None:
    for name, base in (("one", "3b"), ("two", "7b")):
        (models / name).mkdir()
        (models / name / "adapter_model.safetensors").write_bytes(b"weights")
        (models / name / "adapter_config.json").write_text(f'{{"base": "{base}"}}')
    check_different(str(models / "one"), str(models / "two"))


def test_causes_in_words_and_advice_against_these_alone() -> None:
    error = no_pair_left("p.jsonl", {"prompts": 5, ENDLESS: 3, SAME: 2, "pairs": 0})
    assert error.message == (
        "no pair is left of 'p.jsonl': of 5 prompts, 3 with an answer without an end, "
        "2 with the same answer twice"
    )
    assert error.hint == "raise --max-new-tokens, or take models that differ more"
    assert "max-new-tokens" not in str(no_pair_left("p", {"prompts": 1, SAME: 1}).hint)
    assert "max-new-tokens" not in str(no_pair_left("p", {"prompts": 1, EMPTY: 1}).hint)
