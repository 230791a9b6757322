"""Objectives on pairs of answers, and the objective that is measured: values and mistakes."""

import math
from typing import Any

import pytest
import torch

from unlearn.activations import Activations
from unlearn.errors import UserError
from unlearn.objectives import OBJECTIVES, batch_loss
from unlearn.scores import Scores

PAIRS = [name for name, objective in OBJECTIVES.items() if objective.compares]


def drawn(seed: int, width: int = 6) -> Scores:
    """Scores of random logits that a gradient can flow into; the first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, width, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (3, width), generator=generator)
    labels[:, :2] = -100
    return Scores.from_logits(logits.requires_grad_(), labels)


def certain(*log_probs: float) -> Scores:
    """Scores of one row with these token log-probabilities."""
    values = torch.tensor([log_probs], dtype=torch.float64)
    mask = torch.ones_like(values, dtype=torch.bool)
    return Scores(values, mask, mask)


def test_dpo_at_the_start_is_two_ln_two_over_beta() -> None:
    """Policy = reference on both answers: -(2 / 0.1) log sigmoid(0) = 20 ln 2 = 13.863."""
    chosen, rejected = drawn(0), drawn(1, width=9)
    loss = batch_loss("dpo", chosen, chosen, rejected=rejected, rejected_reference=rejected)
    assert loss.item() == pytest.approx(20 * math.log(2))


def test_dpo_by_hand() -> None:
    """Chosen gained 1 nat, rejected lost 2 nats: -(2 / 0.5) log sigmoid(0.5 * 3)."""
    loss = batch_loss(
        "dpo", certain(-1.0, -1.0), certain(-2.0, -1.0), beta=0.5,
        rejected=certain(-4.0), rejected_reference=certain(-2.0),
    )  # fmt: skip
    assert loss.item() == pytest.approx(4 * math.log(1 + math.exp(-1.5)))


def test_dpo_whose_chosen_answers_stay_is_npo() -> None:
    """DPO without its winning half is NPO (Zhang et al. 2024)."""
    kept, rejected, start = drawn(2), drawn(3), drawn(4)
    dpo = batch_loss("dpo", kept, kept, rejected=rejected, rejected_reference=start, beta=0.3)
    assert dpo.item() == pytest.approx(batch_loss("npo", rejected, start, beta=0.3).item())


def test_dpo_gradient_at_the_start_raises_one_answer_and_lowers_the_other() -> None:
    """There sigmoid'(0) makes the gradient mean(log rejected) - mean(log chosen)."""
    chosen, rejected = drawn(5), drawn(6)
    loss = batch_loss(
        "dpo", chosen, chosen.detach(), rejected=rejected, rejected_reference=rejected.detach()
    )
    ours = torch.autograd.grad(loss, [chosen.logits, rejected.logits], retain_graph=True)
    plain = rejected.sequence.mean() - chosen.sequence.mean()
    theirs = torch.autograd.grad(plain, [chosen.logits, rejected.logits])
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


def test_ap_by_hand() -> None:
    """Answer at -1, refusal at -5 nats (sums): -(1 / 0.1) log sigmoid(0.1 * 4)."""
    loss = batch_loss("ap", certain(-0.5, -0.5), rejected=certain(-5.0), beta=0.1)
    assert loss.item() == pytest.approx(10 * math.log(1 + math.exp(-0.4)))
    even = batch_loss("ap", certain(-3.0), rejected=certain(-3.0), beta=0.1)
    assert even.item() == pytest.approx(10 * math.log(2))
    worse = batch_loss("ap", certain(-500.0), rejected=certain(-3.0), beta=0.1)
    assert worse.item() == pytest.approx(497, rel=1e-6)  # log(r / c), where the refusal is likelier


@pytest.mark.parametrize("name", PAIRS)
def test_a_frozen_start_gets_no_gradient_and_a_prompt_none_on_either_side(name: str) -> None:
    chosen, rejected, start = drawn(7), drawn(8, width=8), drawn(9)
    given = {"rejected": rejected}
    if OBJECTIVES[name].uses_reference:
        given |= {"reference": start.detach(), "rejected_reference": rejected.detach()}
    batch_loss(name, chosen, **given).backward()
    assert start.logits.grad is None
    for scores in (chosen, rejected):
        assert (scores.logits.grad[~scores.mask] == 0).all()
        assert (scores.logits.grad[scores.mask] != 0).any()


@pytest.mark.parametrize("name", PAIRS)
def test_padding_of_either_answer_changes_nothing(name: str) -> None:
    chosen, rejected = drawn(10), drawn(11)

    def wider(scores: Scores) -> Scores:
        parts = (scores.log_probs.detach(), scores.mask, scores.attended)
        return Scores(*(torch.nn.functional.pad(part, (0, 3)) for part in parts))

    def loss(*given: Scores) -> Any:
        start = {"reference": drawn(12), "rejected_reference": drawn(13)}
        start = start if OBJECTIVES[name].uses_reference else {}
        return batch_loss(name, given[0], rejected=given[1], **start)

    torch.testing.assert_close(loss(wider(chosen), rejected), loss(chosen, rejected))
    torch.testing.assert_close(loss(chosen, wider(rejected)), loss(chosen, rejected))


@pytest.mark.parametrize("name", PAIRS)
def test_an_empty_row_is_no_pair(name: str) -> None:
    """A row that only fills up a batch adds neither a loss nor a unit."""
    chosen, rejected = drawn(14), drawn(15)

    def cut(scores: Scores, rows: slice, attended: bool) -> Scores:
        mask = scores.attended[rows] & attended
        return Scores(scores.log_probs[rows] * mask, scores.mask[rows] & mask, mask)

    def joined(scores: Scores) -> Scores:
        real, empty = cut(scores, slice(0, 2), True), cut(scores, slice(2, 3), False)
        parts = ("log_probs", "mask", "attended")
        return Scores(*(torch.cat([getattr(real, p), getattr(empty, p)]) for p in parts))

    def loss(change: Any) -> Any:
        start = {"reference": change(drawn(16)), "rejected_reference": change(drawn(17))}
        start = start if OBJECTIVES[name].uses_reference else {}
        return batch_loss(name, change(chosen), rejected=change(rejected), **start)

    torch.testing.assert_close(loss(joined), loss(lambda s: cut(s, slice(0, 2), True)))


def test_adaptive_rmu_is_rmu_with_a_measured_length() -> None:
    """5 times a mean norm of 1.5 is a vector of length 7.5."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[-100, 1, 2]])
    hidden = torch.randn(1, 3, 8, generator=generator)
    said = Activations.of(hidden, {"labels": labels, "attention_mask": torch.ones_like(labels)})
    ours = batch_loss("adaptive_rmu", said, scale=5.0, token_norm=1.5, control_seed=3)
    assert torch.equal(ours, batch_loss("rmu", said, steering=7.5, control_seed=3))
    with pytest.raises(UserError, match="needs token_norm, which only a run measures by itself"):
        batch_loss("adaptive_rmu", said)


def test_mistakes_are_named() -> None:
    chosen, rejected = drawn(18).detach(), drawn(19).detach()
    with pytest.raises(UserError, match="dpo compares two answers and needs 'rejected'"):
        batch_loss("dpo", chosen, chosen)
    with pytest.raises(
        UserError, match="npo takes no pair: leave 'rejected' out, or use one of ap"
    ):
        batch_loss("npo", chosen, chosen, rejected=rejected)
    with pytest.raises(UserError, match="a reference model for the rejected answers too"):
        batch_loss("dpo", chosen, chosen, rejected=rejected)
    with pytest.raises(UserError, match="dpo needs a reference model"):
        batch_loss("dpo", chosen, rejected=rejected)
