"""KL from the start: 0 at the start, and the plain formula elsewhere."""

from typing import Any

import pytest
import torch

from unlearn import head
from unlearn.data.encode import IGNORE, Example
from unlearn.evals import retain_kl
from unlearn.evals.retain_kl import mean_kl
from unlearn.scores import Scorer

ROWS = [
    Example([1, *range(10, 10 + n)], [IGNORE, IGNORE, *range(11, 10 + n)], 2, row)
    for row, n in enumerate((3, 12, 5, 8))
]


def naive(start: Any, model: Any) -> float:
    """Row by row: sum over the vocabulary at every position before a labelled token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            ids = torch.tensor([row.input_ids])
            p, q = (one(input_ids=ids).logits[0].double().log_softmax(-1) for one in (start, model))
            for at, label in enumerate(row.labels[1:]):
                if label != IGNORE:
                    total += float((p[at].exp() * (p[at] - q[at])).sum())
                    count += 1
    return total / count


def test_the_start_is_at_distance_0(build_tiny_model: Any) -> None:
    value, tokens = mean_kl(build_tiny_model(), build_tiny_model(), ROWS)
    assert value == 0.0
    assert tokens == sum(label != IGNORE for row in ROWS for label in row.labels) == 24


@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
def test_it_is_the_plain_formula_whatever_the_batches(
    build_tiny_model: Any, batch_tokens: int
) -> None:
    start, model = build_tiny_model(0), build_tiny_model(1)
    value, _ = mean_kl(start, model, ROWS, batch_tokens=batch_tokens)
    assert value == pytest.approx(naive(start, model), rel=1e-5)
    assert value != pytest.approx(naive(model, start), rel=1e-3)  # it has a direction


def test_a_model_without_a_known_head_gives_the_same(
    build_tiny_model: Any, monkeypatch: Any
) -> None:
    """Then whole logits are used, of so many tokens at once that they stay within the bound."""
    start, model = build_tiny_model(0), build_tiny_model(1)
    known, _ = mean_kl(start, model, ROWS)
    monkeypatch.setattr(retain_kl, "CHUNK_BYTES", 10 * 4 * 300)
    monkeypatch.setattr(retain_kl.Scorer, "for_model", lambda model: Scorer(None))
    sizes = []
    hook = model.register_forward_hook(lambda module, given, out: sizes.append(out.logits.shape))
    found, _ = mean_kl(start, model, ROWS)
    hook.remove()
    assert found == pytest.approx(known, rel=1e-5)
    assert all(rows == 1 or rows * length <= 10 for rows, length, _ in sizes)
    assert sum(rows for rows, _, _ in sizes) == 4


def test_only_labelled_positions_reach_the_heads(build_tiny_model: Any, monkeypatch: Any) -> None:
    """24 of the 28 positions, in pieces of at most 5."""
    start, model = build_tiny_model(0), build_tiny_model(1)
    kl, seen = retain_kl._kl, []

    def watched(reference: Any, policy: Any) -> Any:
        seen.append(len(reference))
        return kl(reference, policy)

    monkeypatch.setattr(retain_kl, "_kl", watched)
    monkeypatch.setattr(head, "CPU_PIECE_BYTES", 5 * 4 * 300)
    mean_kl(start, model, ROWS, batch_tokens=20)
    assert sum(seen) == 24
    assert max(seen) == 5


def test_dropout_is_off_and_modes_stay(build_tiny_model: Any) -> None:
    start, model = build_tiny_model(attention_dropout=0.5), build_tiny_model(attention_dropout=0.5)
    model.train()
    assert mean_kl(start, model, ROWS)[0] == 0.0
    assert model.training
