"""KL(uniform || policy): 0 where all tokens are as likely, above it everywhere else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.objectives import batch_loss
from unlearn.objectives.distribution import uniform, uniform_all_positions
from unlearn.scores import Scores

LABELS = torch.tensor([[-100, 5, 6, 2], [-100, 7, 2, -100]])
ATTENDED = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def scores(logits: torch.Tensor) -> Scores:
    return Scores.from_logits(logits, LABELS, ATTENDED)


def test_uniform_logits_give_zero():
    assert uniform(scores(torch.full((2, 4, 11), 3.0))).abs().max() < 1e-6


def test_two_tokens_by_hand():
    """p = (3/4, 1/4): KL(U || p) = ln(1/2) - (ln 3/4 + ln 1/4) / 2 = ln(2 / sqrt 3)."""
    logits = torch.tensor([math.log(3.0), 0.0]).expand(1, 2, 2)
    found = uniform(Scores.from_logits(logits, torch.tensor([[-100, 1]])))
    assert found.tolist() == [[pytest.approx(math.log(2 / math.sqrt(3)), abs=1e-6)] * 2]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), scale=st.floats(0, 50))
def test_never_negative_and_padding_counts_only_when_asked(seed, scale):
    logits = scale * torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(seed)).double()
    masked, every = uniform(scores(logits)), uniform_all_positions(scores(logits))
    assert (every >= -1e-12).all()
    assert torch.equal(masked, every * ATTENDED)


def test_the_mean_is_the_published_one():
    """With all positions: sum over the vocabulary of (log(1/V) - log p) / V, over B * T."""
    logits = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(0)).double()
    target = torch.full_like(logits, 1 / 11)
    published = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="sum") / 8
    assert torch.isclose(batch_loss("uniform_all_positions", scores(logits)), published)
    assert batch_loss("uniform", scores(logits)) != published
