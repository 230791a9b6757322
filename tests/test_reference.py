"""The frozen start: what is cached, when it is computed again, and the live alternative."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn.data.collate import pad
from unlearn.data.encode import Example
from unlearn.models import Lora, add_lora, weights_hash
from unlearn.reference import LiveReference, cache_key, score_rows, stored_rows
from unlearn.scores import Scorer


def examples(lengths: Sequence[int], prompt: int = 2) -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    found = []
    for row, length in enumerate(lengths):
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        found.append(Example(ids, [-100] * prompt + ids[prompt:], prompt, row))
    return found


class Untouchable:
    """A scorer that must not be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("the model was asked although the numbers are stored")


ROWS = examples([5, 11, 3, 8, 8])


@pytest.fixture
def keep(tiny_model: Any, tmp_path: Path) -> Any:
    """Give a function that scores ROWS through the cache folder of this test."""
    scorer = Scorer.for_model(tiny_model)

    def run(model: Any = tiny_model, rows: Any = ROWS, scorer: Any = scorer) -> list[Any]:
        return stored_rows(scorer, model, rows, weights_hash=weights_hash(model), folder=tmp_path)

    return run


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("batch_tokens", [1, 16, 10_000])
def test_rows_are_scored_in_order_whatever_the_batches(batch_tokens: int, tiny_model: Any) -> None:
    scorer, seen = Scorer.for_model(tiny_model), []
    rows = score_rows(
        scorer, tiny_model, ROWS, batch_tokens=batch_tokens, progress=lambda *n: seen.append(n)
    )
    for row, example in zip(rows, ROWS, strict=True):
        alone = scorer(tiny_model, pad([example], 0))
        torch.testing.assert_close(row, alone.log_probs[0], rtol=0, atol=1e-5)
        labelled = [label != -100 for label in example.labels[1:]] + [False]
        assert (row < 0).tolist() == labelled
        assert not row.requires_grad
    done = [number for number, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1] == (len(ROWS), len(ROWS))


def test_the_second_call_does_not_ask_the_model(keep: Any) -> None:
    first = keep()
    second = keep(scorer=Untouchable())
    assert [row.shape for row in second] == [row.shape for row in first]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other rows", "other names"])
def test_a_damaged_file_is_computed_again_and_replaced(
    damage: str, keep: Any, tmp_path: Path
) -> None:
    from safetensors.torch import save

    first = keep()
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-9],
            "garbage": b"\xff" * len(whole),
            "other rows": save({"log_probs": torch.zeros(3)}),
            "other names": save({"numbers": torch.zeros(35)}),
        }[damage]
    )
    again = keep()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert files(tmp_path) == [path]
    assert path.read_bytes() == whole


def test_whatever_changes_the_numbers_changes_the_file(keep: Any, build_tiny_model: Any) -> None:
    """Weights, one label, precision, and a setting that is no weight: the rotary base."""
    keep()
    unlabelled = replace(ROWS[0], labels=[-100] * 3 + ROWS[0].labels[3:])
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    for model, rows in (
        (build_tiny_model(seed=1), ROWS),
        (build_tiny_model(), [unlabelled, *ROWS[1:]]),
        (build_tiny_model().bfloat16(), ROWS),
        (build_tiny_model(**rope), ROWS),
    ):
        with pytest.raises(AssertionError, match="the model was asked"):
            keep(model, rows, Untouchable())
    assert weights_hash(build_tiny_model(**rope)) == weights_hash(build_tiny_model())


def test_the_key_tells_where_a_row_ends() -> None:
    """The same tokens in other rows, or an answer that starts elsewhere, are other numbers."""
    one = [Example([5, 6], [-100, 6], 1, 0), Example([7], [-100], 1, 1)]
    two = [Example([5], [-100], 1, 0), Example([6, 7], [6, -100], 1, 1)]
    keys = {cache_key("w", rows, "float32") for rows in (one, two, one[::-1], one[:1])}
    keys |= {cache_key("v", one, "float32"), cache_key("w", one, "bfloat16")}
    assert len(keys) == 6
    assert cache_key("w", list(one), "float32") in keys


def test_a_cache_that_cannot_be_written_costs_a_warning(tiny_model: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    scorer = Scorer.for_model(tiny_model)
    with pytest.warns(UserWarning, match="not kept for the next run"):
        rows = stored_rows(scorer, tiny_model, ROWS, weights_hash="w", folder=blocked)
    assert [len(row) for row in rows] == [5, 11, 3, 8, 8]


def shift(model: Any) -> None:
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.1)


def test_the_copy_stays_what_it_was(tiny_model: Any) -> None:
    batch = {"forget": pad(ROWS, 0)}
    live = LiveReference.of(tiny_model)
    before = live.streams(tiny_model, batch, {})["forget"].log_probs
    shift(tiny_model)
    after = live.streams(tiny_model, batch, {})["forget"].log_probs
    assert torch.equal(before, after)
    assert not any(tensor.requires_grad for tensor in live.model.parameters())
    moved = Scorer.for_model(tiny_model)(tiny_model, batch["forget"]).log_probs
    assert (moved - before).abs().max() > 0.1


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_are_off_for_the_reference_and_on_again(
    wrapped: bool, build_tiny_model: Any
) -> None:
    """Also inside a wrapper as engines make them, with dropout, which must not reach it."""
    plain = build_tiny_model()
    batch = {"forget": pad(ROWS, 0)}
    expected = Scorer.for_model(plain)(plain, batch["forget"]).log_probs
    model = add_lora(build_tiny_model(attention_dropout=0.5), Lora(rank=2, dropout=0.5)).train()
    live = LiveReference.of(model)
    assert live.model is None
    shift(model)
    policy = model
    if wrapped:
        policy = torch.nn.Module()
        policy.module = model
        policy.forward = model.forward
    got = live.streams(policy, batch, {})["forget"].log_probs
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert policy.training
    assert model.training
    trained = Scorer(live.scorer.head)(model.eval(), batch["forget"]).log_probs
    assert (trained - expected).abs().max() > 0.1
