"""Losses by hand, and gradients: of two passes as of one, and nowhere but where they belong."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from unlearn.data.encode import Example
from unlearn.errors import UserError
from unlearn.mtp.layout import Blocks, draw_anchors, eligible
from unlearn.mtp.learner import Learner
from unlearn.mtp.losses import latent_consistency, soft_cross_entropy
from unlearn.mtp.passes import Sums, losses_of, read_text, recomputing
from unlearn.mtp.predictor import frozen_model
from unlearn.mtp.settings import TrainSettings

HOW = TrainSettings(k=3, rank=4, steps=5, batch=2, anchors=8)


def sequence(length: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(97, (length,), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:4] = -100
    return ids, labels


def losses(predictor: Any, how: TrainSettings = HOW, *, ntp: int = 0) -> Sums:
    ids, labels = sequence()
    blocks = Blocks.at(eligible(labels), ids, labels, 3)
    text = read_text(predictor, ids)
    with predictor.gate.open(blocks.positions.numel()):
        found = losses_of(predictor, how, text, blocks, torch.arange(3, 3 + ntp))
        if torch.is_grad_enabled():
            (found.base + found.sampler + found.lcm).backward()
    return found


def gradients(predictor: Any) -> dict[str, torch.Tensor]:
    found = {name: one.grad.clone() for name, one in predictor.trained().items()}
    for one in predictor.trained().values():
        one.grad = None
    return found


def test_losses_of_a_single_mask_by_its_logits(predictor: Any) -> None:
    """Three learnt tokens after the prompt: one anchor (the last token of the prompt), two pairs.

    Its losses are those of a separate prompt: log-softmax at the labels, mean squares of the
    differences from the text's own hidden states at the same places.
    """
    ids, labels = sequence(7)
    labels[:5] = -100
    blocks = Blocks.at(eligible(labels), ids, labels, 3)
    assert blocks.labels.tolist() == [[int(ids[6]), -100, -100]]
    text = read_text(predictor, ids)
    with torch.no_grad(), predictor.gate.open(3):
        found = losses_of(predictor, HOW, text, blocks, ids[:0])
        z = predictor.read(
            torch.cat([predictor.embed(ids[:5]), predictor.masks[:1]])[-1:],
            torch.tensor([5]),
            torch.ones(1, 6, dtype=torch.bool),
            read_text_of(predictor, ids[:5]),
        )[0]
        base = predictor.head.logits(z[None]).log_softmax(-1)[0, ids[6]]
        chained = predictor.sampler(predictor.embed(ids[5]), z)
        sampled = predictor.head.logits(chained[None]).log_softmax(-1)[0, ids[6]]
    assert found.base.item() == pytest.approx(-base.item(), abs=1e-9)
    assert found.sampler.item() == pytest.approx(-sampled.item(), abs=1e-9)
    # squares are summed in float32, as every loss
    assert found.lcm.item() == pytest.approx((text.hidden[5] - z).square().mean().item(), rel=1e-6)


def read_text_of(predictor: Any, ids: torch.Tensor) -> Any:
    with predictor.gate.open(0):
        return read_text(predictor, ids).cache


def test_two_passes_have_the_gradients_of_one(predictor: Any) -> None:
    """One pass over text and masks together, the text's hidden states detached by hand."""
    ids, labels = sequence()
    blocks = Blocks.at(eligible(labels), ids, labels, 3)
    with frozen_model(predictor.model):
        two = losses(predictor)
        ours = gradients(predictor)
        n, number = len(ids), blocks.positions.numel()
        visible = torch.zeros(n + number, n + number, dtype=torch.bool)
        visible[:n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
        visible[n:] = blocks.visible()
        embedded = torch.cat([predictor.embed(ids), predictor.masks.repeat(len(blocks.anchors), 1)])
        positions = torch.cat([torch.arange(n), blocks.positions.flatten()])
        with predictor.gate.open(number):
            hidden = predictor.read(embedded, positions, visible, None)
            z, pairs = hidden[n:], blocks.pairs.flatten()
            wanted = blocks.labels.flatten()[pairs]
            chained = predictor.sampler(predictor.embed(blocks.previous.flatten()[pairs]), z[pairs])
            total = latent_consistency(
                z[pairs], hidden[blocks.counterpart.flatten()[pairs]], "mean"
            ).sum()
            for states in (z[pairs], chained):
                logits = predictor.head.logits(states)
                total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            total.backward()
    theirs = gradients(predictor)
    assert (two.base + two.sampler + two.lcm).item() == pytest.approx(total.item(), rel=1e-6)
    for name, gradient in ours.items():
        # consistency is float32 in both, summed in another order
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-6, atol=1e-6, msg=name)


def test_activations_computed_again_change_nothing(predictor: Any) -> None:
    with frozen_model(predictor.model):
        losses(predictor)
        plain = gradients(predictor)
        with recomputing(predictor, on=True):
            losses(predictor)
    for name, gradient in gradients(predictor).items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-12, msg=name)
    assert not any(module.training for module in predictor.model.modules())


def test_without_the_read_only_mark_the_text_would_be_lost(
    predictor: Any, monkeypatch: Any
) -> None:
    """transformers takes the cache from layers that compute again: found by the mask's width."""
    from unlearn.mtp import passes

    monkeypatch.setattr(passes, "READS", "_another_name")
    monkeypatch.setattr(passes.GradientCheckpointingLayer, "_another_name", False, raising=False)
    lost = pytest.raises(Exception, match="None")
    with frozen_model(predictor.model), recomputing(predictor, on=True), lost:
        losses(predictor)


def test_gradients_reach_only_what_is_added(predictor: Any) -> None:
    with frozen_model(predictor.model):
        losses(predictor)
    assert all(one.grad is None for one in predictor.model.parameters())
    assert all(bool(one.any()) for one in gradients(predictor).values())


def test_consistency_is_zero_for_equal_states_and_does_not_move_the_anchor() -> None:
    """(1 - 3)^2 and (2 - 2)^2: mean 2, sum 4; the gradient at the mask is 2 (m - z) / 2."""
    mask = torch.tensor([[1.0, 2.0]], requires_grad=True)
    anchor = torch.tensor([[3.0, 2.0]], requires_grad=True)
    assert latent_consistency(mask, mask, "mean").item() == 0
    assert latent_consistency(mask, anchor, "sum").item() == 4
    found = latent_consistency(mask, anchor, "mean")
    found.sum().backward()
    assert found.item() == 2
    assert mask.grad.tolist() == [[-2.0, 0.0]]
    assert anchor.grad is None


def test_soft_labels_are_least_at_the_teacher_itself(predictor: Any) -> None:
    """Cross-entropy to one's own distribution is its entropy, and its gradient is 0."""
    hidden = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    found = soft_cross_entropy(predictor.head, hidden, hidden)
    log_probs = predictor.head.logits(hidden).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(found, entropy)
    found.sum().backward()
    assert hidden.grad.abs().max().item() < 1e-12


def test_own_labels_are_what_the_base_finds_likeliest(predictor: Any) -> None:
    """With them the base's loss is the log-probability of the text's own choices, whatever the data
    says: other labels in the data give the same."""
    how = replace(HOW, labels="self")
    with torch.no_grad():
        found = losses(predictor, how)
        data = losses(predictor)
    ids, labels = sequence()
    blocks = Blocks.at(eligible(labels), ids, labels, 3)
    text = read_text(predictor, ids)
    own = predictor.head.logits(text.hidden).argmax(-1)[blocks.counterpart]
    moved = replace(blocks, labels=torch.where(blocks.pairs, own, -100))
    with torch.no_grad(), predictor.gate.open(blocks.positions.numel()):
        theirs = losses_of(predictor, HOW, text, moved, ids[:0])
    assert found.base.item() == pytest.approx(theirs.base.item(), abs=1e-9)
    assert found.base.item() != pytest.approx(data.base.item(), rel=1e-3)


def test_the_sampler_at_ordinary_positions_adds_to_its_own_loss_only(predictor: Any) -> None:
    """Two positions more: minus the log-probability of their next tokens, told their own."""
    ids, _ = sequence()
    with torch.no_grad():
        without, found = losses(predictor), losses(predictor, ntp=2)
        text = read_text(predictor, ids)
        at = torch.tensor([3, 4])
        logits = predictor.head.logits(predictor.sampler(predictor.embed(ids[at]), text.hidden[at]))
        more = -logits.log_softmax(-1)[torch.arange(2), ids[at + 1]].sum()
    assert found.sampler.item() - without.sampler.item() == pytest.approx(more.item(), abs=1e-9)
    assert (found.base, found.lcm) == (without.base, without.lcm)


def test_own_previous_tokens_are_those_of_decoding(predictor: Any) -> None:
    """The sampler's chain from the first true token, as drafts are made."""
    from unlearn.mtp.losses import own_previous

    hidden = torch.randn(2, 3, 64, dtype=torch.float64)
    found = own_previous(predictor, hidden, torch.tensor([5, 6]))
    assert found[:, 0].tolist() == [5, 6]
    with torch.no_grad():
        for row in range(2):
            drafts = predictor.draft(found[row, 0], hidden[row])
            assert found[row, 1:].tolist() == drafts[:-1].tolist()
    with torch.no_grad():
        own = losses(predictor, replace(HOW, previous="own"))
    assert math.isfinite(own.sampler.item())


def test_drawn_anchors_have_the_mean_gradient_of_all(predictor: Any) -> None:
    """The gradient summed over 60 draws of 3 of 8 anchors points where that of all 8 does."""
    ids, labels = sequence()
    text = read_text(predictor, ids)

    def gradient(anchors: torch.Tensor) -> torch.Tensor:
        blocks = Blocks.at(anchors, ids, labels, 3)
        with predictor.gate.open(blocks.positions.numel()):
            found = losses_of(predictor, HOW, text, blocks, ids[:0])
            (found.base + found.sampler).backward()
        return torch.cat([one.flatten() for one in gradients(predictor).values()])

    generator = torch.Generator().manual_seed(0)
    with frozen_model(predictor.model):
        whole = gradient(eligible(labels))
        drawn = sum(gradient(draw_anchors(labels, 3, generator)) for _ in range(60))
    assert torch.nn.functional.cosine_similarity(whole, drawn, dim=0).item() > 0.95


def test_a_step_does_not_depend_on_how_its_rows_are_divided(
    build_predictor: Any, sharp_model: Any
) -> None:
    """Two rows at once: the gradient is the mean over all their masks, 21 + 6, not over rows."""
    rows = [Example(one.tolist(), one.tolist(), 0, at) for at, one in
            enumerate((sequence(10)[0], sequence(5)[0]))]  # fmt: skip
    predictor = build_predictor(sharp_model)
    how = replace(HOW, max_grad_norm=0.0, lcm_weight=0.0)  # consistency is summed in float32
    with frozen_model(sharp_model):
        learner = Learner(predictor, how)
        told = learner.learn(list(enumerate(rows)))
        together = gradients(predictor)
        parts = []
        for at, row in enumerate(rows):
            single = Learner(build_predictor(sharp_model), how)
            parts.append((single.learn([(at, row)]).masks, gradients(single.predictor)))
            single.predictor.detach()
    predictor.detach()
    assert told.masks == sum(masks for masks, _ in parts) == 21 + 6
    for name, gradient in together.items():
        mean = sum(masks * found[name] for masks, found in parts) / told.masks
        # Llama's norms compute in float32, and so do their gradients
        torch.testing.assert_close(gradient, mean, rtol=1e-6, atol=1e-6, msg=name)


def test_settings_under_which_nothing_is_learnt_are_refused() -> None:
    with pytest.raises(UserError, match="nothing would be trained"):
        TrainSettings(base_weight=0.0, lcm_weight=0.0, sampler="none")
    with pytest.raises(UserError, match="sampler_on_ntp"):
        TrainSettings(sampler="none", sampler_on_ntp=True)
