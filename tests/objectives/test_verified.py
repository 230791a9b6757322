"""Objectives on right and wrong answers: REDI, its neighbours, and the parity with TRL."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from unlearn.objectives import batch_loss
from unlearn.objectives.verified import error_norms
from unlearn.scores import Scorer, Scores

LENGTHS = {"chosen": (9, 5, 12), "rejected": (7, 14, 6)}


def batch(side: str) -> dict[str, torch.Tensor]:
    """Give three rows of different length; their first three tokens are the prompt."""
    generator = torch.Generator().manual_seed(len(side))
    lengths, width = LENGTHS[side], max(LENGTHS[side])
    ids = torch.randint(3, 300, (3, width), generator=generator)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~real, -100)
    labels[:, :3] = -100
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": labels}


def said(model: Any) -> dict[str, Scores]:
    return Scorer.for_model(model).streams(model, {s: batch(s) for s in LENGTHS}, want={})


def gradient(loss: torch.Tensor, model: Any) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def model(build_tiny_model: Any) -> Any:
    return build_tiny_model().double()


def redi(scores: dict[str, Scores], alpha: float = 0.8) -> torch.Tensor:
    chosen = batch_loss("answer_nll", scores["chosen"])
    return chosen + alpha * batch_loss("answer_ascent", scores["rejected"])


def test_redi_is_cross_entropy_with_constant_signed_weights(model: Any) -> None:
    """Each row alone, through the model's own logits: sum of w_t log p_t with w = ±1 / (B |y|)."""
    ours = gradient(redi(said(model)), model)
    total = torch.zeros((), dtype=torch.float64)
    for side, sign in (("chosen", -1.0), ("rejected", 0.8)):
        rows = batch(side)
        for ids, labels, length in zip(
            rows["input_ids"], rows["labels"], LENGTHS[side], strict=True
        ):
            logits = model(ids[None, :length]).logits[0, :-1].log_softmax(-1)
            answer = logits[2:].gather(-1, labels[3:length, None])
            total = total + sign * answer.mean() / 3
    theirs = gradient(total, model)
    assert float(total.detach()) == pytest.approx(float(redi(said(model)).detach()), abs=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_alpha_scales_the_wrong_answers_alone(model: Any) -> None:
    none, half, whole = (gradient(redi(said(model), alpha), model) for alpha in (0.0, 0.5, 1.0))
    positives = gradient(batch_loss("answer_nll", said(model)["chosen"]), model)
    torch.testing.assert_close(none, positives, rtol=0, atol=1e-14)
    torch.testing.assert_close(2 * (half - none), whole - none, rtol=0, atol=1e-12)


def test_padding_does_not_matter(model: Any) -> None:
    scores = said(model)["chosen"]
    wide = {
        name: torch.nn.functional.pad(value, (0, 5), value=-100 if name == "labels" else 0)
        for name, value in batch("chosen").items()
    }
    padded = Scorer.for_model(model)(model, wide)
    for name in ("answer_nll", "answer_ascent", "dco"):
        ours, theirs = (batch_loss(name, one).detach() for one in (scores, padded))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_simpo_becomes_the_symmetric_loss_as_beta_vanishes(model: Any) -> None:
    """d/dβ -log σ(β R - γ) at β = 0 is -σ(γ) R."""
    scores, beta, gamma = said(model), 1e-6, 1.0
    simpo = batch_loss("simpo", scores["chosen"], rejected=scores["rejected"], beta=beta)
    scale = beta / (1 + math.exp(-gamma))
    symmetric = gradient(redi(said(model), 1.0), model)
    torch.testing.assert_close(gradient(simpo, model) / scale, symmetric, rtol=0, atol=1e-6)


def of(log_probs: list[list[float]], **more: Any) -> Scores:
    values = torch.tensor(log_probs, dtype=torch.float64, requires_grad=True)
    mask = torch.ones_like(values, dtype=torch.bool)
    return Scores(values, mask, mask, **more)


@pytest.mark.parametrize("attempts", [1, 16, 256])
@pytest.mark.parametrize("log_p", [-1e-9, -0.01, -2.0, -8.0, -29.0, -31.0, -1e5])
def test_dco_has_the_published_gradient_and_stays_finite(attempts: int, log_p: float) -> None:
    """d loss / d log p = -N (1-p)^(N-1) p / (1 - (1-p)^N); towards p = 0 it is -1."""
    scores = of([[log_p]])
    loss = batch_loss("dco", scores, attempts=attempts)
    loss.backward()
    assert loss.isfinite()
    assert scores.log_probs.grad is not None
    found = float(scores.log_probs.grad)
    p = math.exp(log_p)
    if log_p > -1e-6:
        assert found == 0.0  # clamped: it is known already
    elif p < 1e-12:
        assert found == pytest.approx(-1.0, abs=1e-6)
    else:
        factor = attempts * (1 - p) ** (attempts - 1) * p / (1 - (1 - p) ** attempts)
        assert found == pytest.approx(-factor, rel=1e-6)


def test_dco_of_one_attempt_is_the_plain_loss() -> None:
    """-log(1 - (1 - p)) = -log p = 1.5 + 0.5."""
    assert batch_loss("dco", of([[-1.5, -0.5]]), attempts=1).item() == pytest.approx(2.0)


def test_topr_stops_pushing_what_has_faded() -> None:
    """Two tokens, log p 4 below the start: c = e^-4 whole, e^-2 per token; 1 where it has risen."""
    start, now = of([[-1.0, -1.0]]), of([[-3.0, -3.0]])
    for ratio, weight in (("sequence", math.exp(-4)), ("geometric", math.exp(-2))):
        now.log_probs.grad = None
        loss = batch_loss("topr", now, start.detach(), ratio=ratio)
        assert float(loss) == pytest.approx(-6.0 * weight)
        loss.backward()
        torch.testing.assert_close(
            now.log_probs.grad, torch.full((1, 2), weight, dtype=torch.float64)
        )
    assert float(batch_loss("topr", start, now.detach())) == pytest.approx(-2.0)
    assert float(batch_loss("topr", start, start.detach())) == pytest.approx(-2.0)


def test_faded_ascent_has_no_gradient_through_its_weight() -> None:
    """Weight exp(0.5 * -2) of the gradient 1 / 2 per token, and nothing else."""
    scores = of([[-1.0, -3.0]])
    batch_loss("answer_ascent", scores, fade=0.5).backward()
    torch.testing.assert_close(
        scores.log_probs.grad, torch.full((1, 2), math.exp(-1) / 2, dtype=torch.float64)
    )


def from_logits(logits: torch.Tensor, labels: list[int]) -> Scores:
    """Score one row whose tokens after the first are the labels."""
    row = torch.tensor([[0, *labels]])
    return Scores.from_logits(
        torch.cat([logits, logits[-1:]])[None], row.index_fill(1, torch.tensor([0]), -100)
    )


def test_error_norms_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    labels = [3, 0, 8, 8, 2, 5]
    found = error_norms(from_logits(logits, labels))[0, :-1]
    errors = logits.softmax(-1) - torch.nn.functional.one_hot(torch.tensor(labels), 9)
    torch.testing.assert_close(found, errors.norm(dim=-1), rtol=0, atol=1e-12)
    assert error_norms(from_logits(logits, labels))[0, -1] == 0


def test_confident_mistakes_are_left_out_and_uncertain_tokens_are_not() -> None:
    """Both labels have p = 0.01; the other 0.99 lies on one token, or on 99 alike.

    Norms: sqrt(0.99^2 + 0.99^2) = 1.40 and sqrt(0.99^2 + 99 * 0.01^2) = 0.995. What stays counts
    for the three tokens of the answer: its two losses times 3 / 2.
    """
    peaked = torch.full((100,), -30.0, dtype=torch.float64)
    peaked[0], peaked[1] = math.log(0.01), math.log(0.99)
    flat = torch.full((100,), math.log(0.01), dtype=torch.float64)
    scores = from_logits(torch.stack([peaked, flat, flat]), [0, 0, 0])
    assert error_norms(scores)[0, :2].tolist() == pytest.approx([1.400, 0.995], abs=1e-3)
    loss = batch_loss("ent_nll", scores, threshold=1.3)
    assert float(loss) == pytest.approx(-math.log(0.01))
    kept = batch_loss("ent_nll", replace(scores), threshold=1.45)
    assert float(kept) == pytest.approx(-math.log(0.01), abs=1e-6)


def test_a_fraction_drops_exactly_its_share_and_half_always_stays() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(10, 20, generator=generator, dtype=torch.float64).requires_grad_()
    scores = from_logits(logits, list(range(10)))
    for how, dropped in (
        ({"fraction": 0.25}, 2),
        ({"fraction": 0.9}, 5),
        ({"fraction": 0.9, "at_least": 0.75}, 2),
        ({"threshold": 0.01}, 5),
    ):
        (grad,) = torch.autograd.grad(
            batch_loss("ent_nll", scores, **how), logits, retain_graph=True
        )
        zero = (grad == 0).all(-1)
        assert int(zero.sum()) == dropped
        norms = error_norms(scores)[0, :-1]
        assert norms[zero].min() >= norms[~zero].max()


def test_preference_is_dpo_without_its_factor(model: Any, build_tiny_model: Any) -> None:
    ours, start = said(model), said(build_tiny_model(seed=3).double())
    given = {"rejected": ours["rejected"], "rejected_reference": start["rejected"], "beta": 0.3}
    plain = batch_loss("preference", ours["chosen"], start["chosen"], **given)
    scaled = batch_loss("dpo", ours["chosen"], start["chosen"], **given)
    assert float(plain.detach()) == pytest.approx(0.15 * float(scaled.detach()))
