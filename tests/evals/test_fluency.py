import json
import math
from pathlib import Path
from typing import Any

import pytest

from unlearn.evals.fluency import clean_probability, perplexity, repetition


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 4, 0.0),
        ("a b c d a b c d", 4, 1 / 5),  # abcd bcda cdab dabc abcd: one of five again
        ("no no no no no", 1, 4 / 5),
        ("No no NO", 1, 2 / 3),  # case does not count
        ("a b", 2, 0.0),
    ],
)
def test_repetition(text: str, n: int, share: float) -> None:
    assert repetition(text, n=n) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "three words only"])
def test_a_text_shorter_than_one_n_gram_has_no_repetition(text: str) -> None:
    assert repetition(text) is None


def test_perplexity_is_the_geometric_mean() -> None:
    """Perplexities 2 and 8 of two texts: sqrt(16) = 4."""
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    assert math.isnan(perplexity([]))


def test_the_classifier_is_not_downloaded(tmp_path: Path) -> None:
    assert clean_probability(["text"], classifier=str(tmp_path)) is None
    assert clean_probability(["text"], classifier="nobody/no-such-classifier") is None


def test_the_classifier_is_used_where_it_lies(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Logits 0 for both classes without weights: each is as likely as the other."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    found = clean_probability(["one text", "another"], classifier=str(tmp_path))
    assert found == pytest.approx([0.5, 0.5])
