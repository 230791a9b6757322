"""Objectives: hand-derived values, parity with published code, and properties over the table."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.activations import Activations
from unlearn.errors import UserError
from unlearn.objectives import OBJECTIVES, batch_loss, check_hyper
from unlearn.scores import Scores

MEASURED = {"adaptive_rmu": {"token_norm": 2.0}}
"""What a run would measure by itself."""


def random_pair(seed: int, rows: int = 3, width: int = 7) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, 11, generator=generator, dtype=torch.float64)
    other = torch.randn(rows, width, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (rows, width), generator=generator)
    labels[:, :2] = -100
    labels[0, -2:] = -100
    return logits.requires_grad_(), other, labels


def said(name: str, numbers: Any, labels: Any, attention: Any = None) -> Any:
    """What a model says, made of random numbers: its logits, or its hidden states."""
    if OBJECTIVES[name].reads != "hidden":
        scores = Scores.from_logits(numbers, labels, attention)
        return replace(scores, important=scores.mask & (scores.next_tokens % 2 == 0))
    attention = torch.ones_like(labels) if attention is None else attention
    return Activations.of(numbers, {"labels": labels, "attention_mask": attention})


def all_said(name: str, logits: Any, other: Any, labels: Any, attention: Any = None) -> list[Any]:
    """Policy, reference and, for pairs, the same of rejected answers made from the other logits."""
    objective = OBJECTIVES[name]
    rejected = other.flip(-1), other.roll(1, dims=-1)
    numbers = (
        logits,
        other if objective.uses_reference else None,
        rejected[0] if objective.compares else None,
        rejected[1] if objective.compares and objective.uses_reference else None,
    )
    return [None if each is None else said(name, each, labels, attention) for each in numbers]


def value(
    name: str, logits: Any, other: Any, labels: Any, attention: Any = None, **hyper: Any
) -> Any:
    policy, reference, rejected, start = all_said(name, logits, other, labels, attention)
    hyper = MEASURED.get(name, {}) | hyper
    return batch_loss(name, policy, reference, rejected=rejected, rejected_reference=start, **hyper)


def test_nll_of_uniform_logits_is_log_vocabulary() -> None:
    """Three labelled tokens, each -log(1/11): the mean is ln 11; gradient ascent is minus it."""
    logits, labels = torch.zeros(1, 4, 11), torch.tensor([[-100, 1, 2, 3]])
    assert value("nll", logits, logits, labels).item() == pytest.approx(math.log(11))
    assert value("grad_ascent", logits, logits, labels).item() == pytest.approx(-math.log(11))


def test_npo_at_the_start_is_two_ln_two_over_beta() -> None:
    """At policy = reference the ratio is 0: -(2 / 0.1) log sigmoid(0) = 20 ln 2 = 13.863."""
    logits, _, labels = random_pair(0)
    assert value("npo", logits, logits, labels, beta=0.1).item() == pytest.approx(20 * math.log(2))


def test_npo_gradient_at_the_start_is_gradient_ascent_on_sequence_sums() -> None:
    """There the weight 2 p^b / (p^b + ref^b) is 1, so the gradient is that of mean(log p)."""
    logits, _, labels = random_pair(1)
    reference = logits.detach()
    (ours,) = torch.autograd.grad(value("npo", logits, reference, labels, beta=0.1), logits)
    ascent = Scores.from_logits(logits, labels).sequence.mean()
    (expected,) = torch.autograd.grad(ascent, logits)
    torch.testing.assert_close(ours, expected)


def test_npo_tends_to_gradient_ascent_as_beta_vanishes() -> None:
    logits, other, labels = random_pair(2)
    (ours,) = torch.autograd.grad(value("npo", logits, other, labels, beta=1e-7), logits)
    ascent = Scores.from_logits(logits, labels).sequence.mean()
    (expected,) = torch.autograd.grad(ascent, logits)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_kl_by_hand() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln(2)/2 + ln(2/3)/2 = 0.14384 at each of two positions."""
    theirs = torch.log(torch.tensor([[[0.5, 0.5]] * 2], dtype=torch.float64))
    ours = torch.log(torch.tensor([[[0.25, 0.75]] * 2], dtype=torch.float64))
    labels = torch.tensor([[-100, 1]])
    expected = (math.log(2) + math.log(2 / 3)) / 2
    for name in ("kl", "kl_labels", "kl_all_positions"):
        assert value(name, ours, theirs, labels).item() == pytest.approx(expected)


def test_kl_leaves_padding_out_and_the_published_form_does_not() -> None:
    logits, other, labels = random_pair(3, rows=1, width=4)
    attention = torch.tensor([[1, 1, 1, 0]])
    policy = Scores.from_logits(logits, labels, attention)
    reference = Scores.from_logits(other, labels, attention)
    short = value("kl", logits[:, :3], other[:, :3], labels[:, :3])
    torch.testing.assert_close(batch_loss("kl", policy, reference), short)
    assert not torch.isclose(batch_loss("kl_all_positions", policy, reference), short)


def test_rmu_by_hand() -> None:
    """At hidden states 0 the squared distance to a vector of length 6 is 36: mean 36/11 over 11."""
    labels = torch.tensor([[-100, 1, 2]])
    zeros = torch.zeros(1, 3, 11, dtype=torch.float64)
    assert value("rmu", zeros, zeros, labels, steering=6.0).item() == pytest.approx(36 / 11)
    ones = torch.ones(1, 3, 11)
    assert value("embed_diff", ones * 3, ones, labels).item() == 4.0


def test_the_control_vector_is_positive_and_depends_on_its_seed_alone() -> None:
    """The gradient at states 0 is -2/11 times the vector for the one labelled token."""
    labels = torch.tensor([[-100, 1]])
    vectors = []
    for seed in (0, 0, 1):
        zeros = torch.zeros(1, 2, 11, dtype=torch.float64, requires_grad=True)
        value("rmu", zeros, zeros, labels, control_seed=seed, steering=1.0).backward()
        vectors.append(-zeros.grad[0, 1] * 11 / 2)
    assert (vectors[0] > 0).all()
    assert vectors[0].norm().item() == pytest.approx(1.0)
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def dpo_of(record: Any, rejected: Any, rejected_reference: Any) -> Any:
    """The logits and the gradient of a record are about its losing answers."""
    winning = [
        said(
            "dpo",
            torch.tensor(record[key], dtype=torch.float64),
            torch.tensor(record["win_labels"]),
        )
        for key in ("win_logits", "win_ref_logits")
    ]
    return batch_loss(
        "dpo", *winning, rejected=rejected, rejected_reference=rejected_reference, **record["hyper"]
    )


def test_parity_with_open_unlearning(shared: Path) -> None:
    """Losses and gradients equal open-unlearning's own functions to 1e-9 in float64."""
    records = json.loads((shared / "parity" / "objectives.json").read_text())["records"]
    records = [record for record in records if record["name"] in OBJECTIVES]
    assert {record["name"] for record in records} >= {
        "npo", "dpo", "grad_ascent", "nll", "kl_all_positions", "simnpo", "satimp", "wga", "ceu",
        "undial",
    }  # fmt: skip
    # these records label all positions, so that the whole input and the labels are the same
    whole = [record for record in records if record["name"] == "undial"]
    records += [record | {"name": "undial_all_positions"} for record in whole]
    for record in records:
        logits = torch.tensor(record["logits"], dtype=torch.float64, requires_grad=True)
        labels = torch.tensor(record["labels"])
        other = torch.tensor(record.get("ref_logits", record["logits"]), dtype=torch.float64)
        if record["name"] == "dpo":
            loss = dpo_of(record, said("dpo", logits, labels), said("dpo", other, labels))
        else:
            loss = value(record["name"], logits, other, labels, **record["hyper"])
        loss.backward()
        assert loss.item() == pytest.approx(record["loss"], abs=1e-9)
        expected = torch.tensor(record["grad_logits"], dtype=torch.float64)
        torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_finite_value_per_unit(name: str) -> None:
    logits, other, labels = random_pair(4)
    objective = OBJECTIVES[name]
    values = objective(*all_said(name, logits, other, labels), **MEASURED.get(name, {}))
    assert values.shape == ((3,) if objective.unit == "sequence" else (3, 7))
    assert values.isfinite().all()
    values.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [n for n, o in OBJECTIVES.items() if "position" not in o.unit and o.unit != "next token"],
)
def test_unlabelled_positions_get_exactly_zero_gradient(name: str) -> None:
    logits, other, labels = random_pair(5)
    value(name, logits, other, labels).backward()
    mask = said(name, logits, labels).mask
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any()


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 2))
def test_units_add_up_over_any_split_of_the_batch(name: str, seed: int, cut: int) -> None:
    """Sum over units, divided by all units: splitting the batch in two changes nothing."""
    logits, other, labels = random_pair(seed)
    whole = value(name, logits, other, labels)
    objective, total, units = OBJECTIVES[name], 0.0, 0
    for rows in (slice(0, cut), slice(cut, 3)):
        given = all_said(name, logits[rows], other[rows], labels[rows])
        total += objective(*given, **MEASURED.get(name, {})).sum()
        batch = {"labels": labels[rows], "attention_mask": torch.ones_like(labels[rows])}
        units += objective.count(batch)
    torch.testing.assert_close(total / units, whole)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_nothing_and_rows_that_fill_up_count_nothing(name: str) -> None:
    """Two columns of padding and an empty row more: the same value and the same gradient."""
    logits, other, labels = random_pair(8)
    whole = value(name, logits, other, labels)
    (expected,) = torch.autograd.grad(whole, logits)

    def grown(numbers: Any) -> Any:
        return torch.nn.functional.pad(numbers, (0, 0, 0, 2, 0, 1))

    wider = torch.nn.functional.pad(labels, (0, 2, 0, 1), value=-100)
    attention = torch.zeros_like(wider)
    attention[:3, :7] = 1
    found = value(name, grown(logits), grown(other), wider, attention)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all()
    if OBJECTIVES[name].unit == "padded position":  # published: it depends on padding
        return
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_logits_are_computed_in_float32(name: str) -> None:
    logits, other, labels = random_pair(6)
    coarse = value(name, logits.detach().bfloat16(), other.bfloat16(), labels)
    exact = value(name, logits.detach().bfloat16().float(), other.bfloat16().float(), labels)
    assert coarse.dtype == torch.float32
    assert coarse.item() == exact.item()


def test_mistakes_are_named() -> None:
    logits, other, labels = random_pair(7)
    with pytest.raises(UserError, match="did you mean 'npo'"):
        batch_loss("npoo", Scores.from_logits(logits, labels))
    with pytest.raises(UserError, match="did you mean 'beta'"):
        value("npo", logits, other, labels, betta=0.1)
    with pytest.raises(UserError, match="needs a reference model"):
        batch_loss("npo", Scores.from_logits(logits, labels))
    without = Scores.from_logits(logits, labels).detach()
    with pytest.raises(UserError, match="needs scores with logits"):
        batch_loss("kl", without, without)
    with pytest.raises(UserError, match="rmu reads Activations, not Scores"):
        batch_loss("rmu", without)
    assert check_hyper("npo", {"beta": 0.0}) == [
        "beta of npo is 0.0: Input should be greater than 0"
    ]
    assert check_hyper("npo", {"beta": 0.5}) == []
