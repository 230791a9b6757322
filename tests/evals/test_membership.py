import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from unlearn import detect
from unlearn.evals.membership import (
    auc,
    gradnorm,
    loss,
    min_k,
    min_k_plus_plus,
    privleak,
    reference,
    s_mia,
    zlib_ratio,
)
from unlearn.scores import Scores

scores_of_rows = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=30)


def scores(*rows: list[float], mean: float = 0.0, variance: float = 1.0) -> Scores:
    """Lay out token log-probs, the last one EOS, right-padded."""
    longest = max(map(len, rows))
    log_probs = torch.tensor([row + [0.0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
    filled = mask.float()
    return Scores(log_probs, mask, mask, mean=mean * filled, variance=variance * filled)


def test_loss_and_zlib_count_the_end_token() -> None:
    """(1 + 2 + 3) / 3 = 2 nats per token; "aaaa" compresses to some 12 bytes."""
    one = scores([-1.0, -2.0, -3.0])
    assert loss(one, ["aaaa"]).tolist() == [2.0]
    expected = 2 / len(zlib.compress(b"aaaa"))
    assert zlib_ratio(one, ["aaaa"]).tolist() == pytest.approx([expected])


def test_min_k_leaves_the_end_token_out() -> None:
    """Four tokens count: int(0.4 · 4) = 1 of them, -4, and int(0.5 · 4) = 2, -4 and -3."""
    one = scores([-1.0, -4.0, -3.0, -2.0, -9.0], [-5.0, -0.1])
    texts = ["", ""]
    assert min_k(one, texts).tolist() == pytest.approx([4.0, 5.0])  # at least one token
    assert min_k(one, texts, k=0.5).tolist() == pytest.approx([3.5, 5.0])


def test_min_k_plus_plus_standardises() -> None:
    """z = (log p + 2) / 2: 0.5, -1, -0.5, 0; the lowest is -1."""
    one = scores([-1.0, -4.0, -3.0, -2.0, -9.0], mean=-2.0, variance=4.0)
    assert min_k_plus_plus(one, [""]).tolist() == pytest.approx([1.0])
    certain = scores([-1.0, -1.0], mean=0.0, variance=0.0)  # the variance is at least 1e-6
    assert min_k_plus_plus(certain, [""]).tolist() == pytest.approx([1000.0])


def test_an_answer_of_nothing_but_its_end_has_no_score() -> None:
    found = min_k(scores([-1.0], [-1.0, -1.0]), ["", ""])
    assert found.isnan().tolist() == [True, False]


def test_detectors_are_the_same_formulas_with_the_other_sign() -> None:
    one = scores([-1.0, -4.0, -3.0, -2.0])
    assert (loss(one, ["x"]) == -detect.loss(one, ["x"])).all()
    assert (zlib_ratio(one, ["x"]) == -detect.zlib_ratio(one, ["x"])).all()
    # the detector keeps the last token: texts have no EOS
    assert detect.min_k(one, ["x"], k=0.5).item() == pytest.approx(-3.5)
    assert min_k(one, ["x"], k=0.7).item() == pytest.approx(3.5)


def test_reference_is_a_difference_of_losses() -> None:
    assert reference([2.0, 1.0], [0.5, 3.0]).tolist() == [1.5, -2.0]


def test_gradnorm_is_the_mean_norm_of_the_gradients(tiny_model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    labels = torch.tensor([[-100, -100, 7, 8, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    tiny_model.train()
    found = gradnorm(tiny_model, [batch])
    assert tiny_model.training
    assert all(tensor.grad is None for tensor in tiny_model.parameters())
    log_probs = tiny_model(ids).logits.log_softmax(-1)
    (-(log_probs[0, 1, 7] + log_probs[0, 2, 8]) / 2).backward()  # without the end token
    norms = [tensor.grad.norm() for tensor in tiny_model.parameters()]
    assert found == pytest.approx([float(torch.stack(norms).mean())], rel=1e-4)


def test_auc_counts_pairs() -> None:
    """Pairs (1,2) (1,3) (2,3) are won, (2,2) is a tie: 3.5 of 4."""
    assert auc([1, 2], [2, 3]) == 3.5 / 4
    assert auc([0, 0], [1, 1]) == 1.0


@settings(deadline=None, max_examples=60)
@given(scores_of_rows, scores_of_rows)
def test_auc_is_sklearns_and_depends_on_order_alone(low: list[float], high: list[float]) -> None:
    found = auc(low, high)
    labels = [0] * len(low) + [1] * len(high)
    assert found == pytest.approx(roc_auc_score(labels, low + high))
    assert auc(np.exp(low), np.exp(high)) == pytest.approx(found)
    assert auc(high, low) == pytest.approx(1 - found)


def test_privleak() -> None:
    """1 - AUC is what MUSE calls AUC: (0 - 0.5) / 0.5 and (0.75 - 0.5) / 0.5, in percent."""
    assert privleak(1.0) == pytest.approx(-100)
    assert privleak(0.25) == pytest.approx(50)
    assert privleak(0.4, 0.4) == 0.0
    assert privleak(0.7, 0.4) == pytest.approx(-50)  # (0.3 - 0.6) / 0.6


def test_s_mia() -> None:
    assert s_mia(0.6, 0.5) == pytest.approx(0.8)
    assert s_mia(0.5, 0.5) == 1.0
    assert s_mia(1.0, 0.4) == 0.0  # 1 - 1.5, clipped
    assert (s_mia(0.0, 0.0), s_mia(0.1, 0.0)) == (1.0, 0.0)


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1), st.floats(0.01, 0.99))
def test_privleak_and_s_mia_agree_on_what_is_right(ours: float, theirs: float) -> None:
    assert 0 <= s_mia(ours, theirs) <= 1
    assert math.copysign(1, privleak(ours, theirs)) == -1 or ours <= theirs
    assert s_mia(theirs, theirs) == 1
