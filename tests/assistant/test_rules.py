"""The rules by hand: small vocabularies, and properties over random logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.assistant.rules import RULES, asks, likely, offset, subtract, suppress

BASE = torch.tensor([math.log(p) for p in (0.5, 0.3, 0.15, 0.05)], dtype=torch.float64)
ASSISTANT = torch.tensor([4.0, 0.0, -2.0, 6.0], dtype=torch.float64)


def test_subtraction_by_hand_when_scores_are_looked_up():
    """Filter 0.2: tokens with p >= 0.2 * 0.5 stay (three), the last keeps its own logit.

    Half of the assistant's logits (4, 0, -2) is taken: -2, 0 and +1.
    """
    expected = BASE + torch.tensor([-2.0, 0.0, 1.0, 0.0])
    found = subtract(BASE, ASSISTANT, weight=0.5, top_filter=0.2)
    torch.testing.assert_close(found, expected)


def test_a_dropped_token_is_never_written_even_when_kept_scores_are_negative():
    """All kept scores are below 0: multiplying by the mask would give the dropped token 0."""
    found = subtract(BASE, ASSISTANT, weight=0.5, top_filter=0.2, writing=True)
    assert found[3] == -math.inf
    assert (found[:3] < 1).all()
    assert found.argmax() != 3
    assert found[:3].isfinite().all()


@pytest.mark.parametrize(
    ("rate", "kept"),
    [(0.0, 4), (0.01, 4), (0.2, 3), (0.4, 2), (0.7, 2), (0.99, 3)],
)
def test_filter_keeps_tokens_near_the_best_but_not_fewer_than_its_share(rate, kept):
    """0.4: p >= 0.2 (two). 0.7: p >= 0.35 (one), but floor(0.7 * 4) = 2. 0.99: floor is 3."""
    assert likely(BASE, rate).sum() == kept


def test_filter_keeps_the_best_token_of_a_small_vocabulary():
    """floor(0.1 * 4) = 0 tokens would leave nothing to choose from."""
    assert likely(torch.tensor([100.0, 0.0, 0.0, 0.0]), 0.1).tolist() == [True] + [False] * 3


def test_offset_by_hand():
    start = torch.tensor([1.0, 0.0, -2.0, 2.0], dtype=torch.float64)
    change = torch.tensor([6.0, 0.0, 0.0, 8.0])
    torch.testing.assert_close(offset(BASE, ASSISTANT, start, weight=2.0), BASE + change)


def test_suppression_lowers_only_what_became_likelier():
    """With weight 1: min(base, assistant + 2 (base - assistant)) = base where it is larger."""
    found = suppress(BASE, ASSISTANT, weight=1.0)
    grew = ASSISTANT > BASE
    assert grew.tolist() == [True, True, False, True]
    torch.testing.assert_close(found[grew], (2 * BASE - ASSISTANT)[grew])
    assert torch.equal(found[~grew], BASE[~grew])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), writing=st.booleans())
def test_weight_zero_is_the_base_bit_for_bit(rule, dtype, seed, writing):
    logits = torch.randn(3, 2, 5, 11, generator=torch.Generator().manual_seed(seed)).to(dtype)
    given_ = logits if asks(rule, "start") else logits[:2]
    named = {"writing": writing} if asks(rule, "writing") else {}
    assert torch.equal(RULES[rule](*given_, weight=0.0, **named), logits[0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), rate=st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_both_paths_agree_on_kept_tokens(seed, rate):
    base, assistant = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(seed))
    kept = likely(base, rate)
    looked_up = subtract(base, assistant, top_filter=rate)
    written = subtract(base, assistant, top_filter=rate, writing=True)
    assert torch.equal(looked_up[kept], written[kept])
    assert torch.equal(looked_up[~kept], base[~kept])
    assert (written[~kept] == -math.inf).all()
    assert (kept.sum(-1) >= max(1, int(rate * 40))).all()
