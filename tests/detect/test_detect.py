"""Detectors: numbers derived by hand, and one pass over a model against row by row."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from unlearn.detect import DETECTORS, loss, min_k, zlib_ratio
from unlearn.detect.run import score_texts
from unlearn.errors import UserError
from unlearn.scores import Scores

LOG_PROBS = [[-1.0, -4.0, -2.0, -3.0, 0.0], [-6.0, 0.0, 0.0, 0.0, 0.0]]
LENGTHS = [4, 1]
TEXTS = ["some words", "a" * 400]


def scores() -> Scores:
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return Scores(torch.tensor(LOG_PROBS), mask, torch.ones_like(mask))


def test_loss_is_the_mean_over_scored_tokens() -> None:
    """(1 + 4 + 2 + 3) / 4 = 2.5 nats, and 6 nats for the row of one token."""
    assert loss(scores(), TEXTS).tolist() == [-2.5, -6.0]


def test_zlib_divides_by_the_compressed_size_in_bytes() -> None:
    sizes = [len(zlib.compress(text.encode())) for text in TEXTS]
    assert sizes[1] < 20  # 400 equal letters
    expected = [-2.5 / sizes[0], -6.0 / sizes[1]]
    assert zlib_ratio(scores(), TEXTS).tolist() == pytest.approx(expected)


def test_zlib_counts_bytes_not_letters() -> None:
    ascii_text, greek = "abcdefgh", "αβγδεζηθ"
    one = Scores(torch.tensor([[-2.0]] * 2), torch.ones(2, 1).bool(), torch.ones(2, 1).bool())
    first, second = zlib_ratio(one, [ascii_text, greek]).tolist()
    assert first / second == pytest.approx(
        len(zlib.compress(greek.encode())) / len(zlib.compress(ascii_text.encode()))
    )


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1.0, [-2.5, -6.0]),  # all
        (0.5, [-3.5, -6.0]),  # the two least likely of four: (4 + 3) / 2
        (0.25, [-4.0, -6.0]),
        (0.74, [-3.5, -6.0]),  # 2.96 tokens are 2, as published
        (0.01, [-4.0, -6.0]),  # 0.04 tokens: at least one
    ],
)
def test_min_k_is_the_mean_of_the_least_likely_share(k: float, expected: list[float]) -> None:
    assert min_k(scores(), TEXTS, k=k).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", DETECTORS)
def test_more_likely_text_scores_higher_and_padding_does_not_count(name: str) -> None:
    """Every detector rises with every token's probability, and keeps its value in a wider batch."""
    one = replace(
        scores(),
        mean=torch.full((2, 5), -2.5),
        variance=torch.full((2, 5), 1.5),
        top=torch.full((2, 5), -0.25),
    )
    before = DETECTORS[name](one, TEXTS)
    assert (DETECTORS[name](replace(one, log_probs=one.log_probs * 0.5), TEXTS) > before).all()
    fields = ("log_probs", "mask", "attended", "mean", "variance", "top")
    wide = Scores(
        **{field: torch.nn.functional.pad(getattr(one, field), (0, 3)) for field in fields}
    )
    assert torch.equal(DETECTORS[name](wide, TEXTS), before)


LINES = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Ada was born in Oslo.",
    "zzqx",
    "Question: What does Bo paint?",
]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_texts_are_scored_in_order_as_one_by_one(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Against transformers' own mean loss of each line alone."""
    found = score_texts(str(folder), LINES, k=0.3, offline=True)
    assert [row["id"] for row in found] == [0, 1, 2, 3]
    for row, text in zip(found, LINES, strict=True):
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            output = tiny_model(input_ids=ids, labels=ids)
        assert row["n_tokens"] == ids.shape[1] - 1
        got = row["scores"]
        assert got["loss"] == pytest.approx(-float(output.loss), abs=1e-5)
        assert got["zlib"] == pytest.approx(got["loss"] / len(zlib.compress(text.encode())))
        each = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        lowest = each.sort().values[: max(1, math.floor(0.3 * len(each)))]
        assert got["mink"] == pytest.approx(float(lowest.mean()), abs=1e-5)


def test_a_text_longer_than_the_context_is_scored_on_its_start_and_says_so(
    tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    build_tiny_model(max_position_embeddings=8).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    short = tiny_tokenizer.decode(tiny_tokenizer(LINES[0])["input_ids"][:8])
    long, whole = score_texts(str(tmp_path), [LINES[0], short])
    assert long["n_tokens"] == whole["n_tokens"] == 7
    assert long["scores"] == pytest.approx(whole["scores"], abs=1e-6)  # zlib too: of the start
    assert (long["notes"], whole["notes"]) == (["truncated"], [])


@pytest.mark.parametrize("k", [0.0, -0.1, 1.5, 20.0, float("nan")])
def test_a_share_that_is_none_is_refused(k: float, folder: Path) -> None:
    with pytest.raises(UserError, match="k"):
        score_texts(str(folder), LINES, k=k)


def test_members_are_told_from_texts_the_model_never_saw(shared: Path) -> None:
    """Answers of TOFU's forget set against answers about authors that neither model met.

    The target has memorised the former; the retain model has seen neither, so that its AUC is 0.5
    up to the spread of 80 + 80 texts: 1.96 times sqrt(161 / (12 * 80 * 80)) is 0.09.
    """
    texts = [answers(shared, "forget10")[:80], answers(shared, "retain90")[-80:]]
    found = {}
    for name in ("target", "retain90"):
        rows = score_texts(str(shared / "models" / f"tofu-tiny-{name}"), [*texts[0], *texts[1]])
        for score in ("loss", "mink", "minkpp"):
            values = [row["scores"][score] for row in rows]
            found[name, score] = roc_auc_score([1] * 80 + [0] * 80, values)
    for score in ("loss", "mink", "minkpp"):
        assert found["target", score] >= 0.95
        assert abs(found["retain90", score] - 0.5) <= 0.09


def answers(shared: Path, name: str) -> list[str]:
    lines = (shared / "data" / "tofu" / f"{name}.json").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]
