"""The search for the scale of a step, the weights it is added to, and the distance it makes."""

import math

import pytest
import torch

from unlearn.curvature.direction import Direction
from unlearn.curvature.distance import Reference, mean_nll, spaced
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.curvature.steps import Goal, Reading, Weights, search
from unlearn.scores import Scorer

NOW = Reading(nll=1.0, kl=0.0)


def curve(alpha):
    """A loss that rises as the root of the scale, a KL that rises with it."""
    return Reading(nll=1 + 10 * math.sqrt(alpha), kl=alpha)


@pytest.mark.parametrize("start", [1e-6, 0.01, 0.04, 1.0, 100.0])
def test_a_search_reaches_its_loss_within_a_twentieth_of_the_rise(start):
    """1 + 10 √α = 3 at α = 0.04."""
    found = search(curve, NOW, start, Goal(nll=3.0, kl=1.0, rise=2.0), trials=20)
    assert abs(found.reading.nll - 3.0) <= 0.1
    assert found.reading == curve(found.alpha)


def test_a_search_measures_at_most_as_often_as_it_may():
    calls = []

    def measure(alpha):
        calls.append(alpha)
        return curve(alpha)

    found = search(measure, NOW, 1e-4, Goal(nll=3.0, kl=1.0, rise=2.0))
    assert found.evaluations == len(calls) <= 8
    assert found.alpha <= 0.042


@pytest.mark.parametrize("start", [1e-5, 1.0])
def test_a_search_never_exceeds_its_kl(start):
    """The loss asked for needs α = 0.04; a KL of 0.01 allows 0.01 alone."""
    found = search(curve, NOW, start, Goal(nll=3.0, kl=0.01, rise=2.0), trials=20)
    assert 0.0095 <= found.reading.kl <= 0.01


def test_without_a_loss_to_reach_the_kl_is_used_up():
    found = search(curve, NOW, 1e-5, Goal(nll=None, kl=0.5), trials=20)
    assert 0.475 <= found.reading.kl <= 0.5


def test_what_is_not_finite_is_too_far():
    def breaks(alpha):
        return curve(alpha) if alpha < 0.02 else Reading(math.nan, math.nan)

    found = search(breaks, NOW, 1.0, Goal(nll=3.0, kl=1.0, rise=2.0), trials=12)
    assert 0.015 < found.alpha < 0.02


def test_a_step_past_the_top_is_too_far():
    """A loss of 1 + 4α − α² is highest, 5, at α = 2; it never reaches 6 and falls below 1."""
    found = search(
        lambda alpha: Reading(1 + 4 * alpha - alpha**2, 0.0), NOW, 16.0, Goal(6.0, 1.0, 5.0),
        trials=12,
    )  # fmt: skip
    assert 4.0 < found.reading.nll <= 5.0


def test_where_every_step_is_too_far_there_is_none():
    assert search(lambda alpha: Reading(9.0, 9.0), NOW, 1.0, Goal(3.0, 1.0, 2.0)) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_are_the_start_and_the_sum_of_steps(fresh_model, kind):
    """A trial leaves no trace; two steps in bfloat16 are rounded once, not twice."""
    model = fresh_model(kind).bfloat16()
    layers = find_layers(model)
    before = {layer.name: layer.weight.detach().float().clone() for layer in layers}
    others = {name: one.clone() for name, one in model.named_parameters()
              if not any(layer.module.weight is one for layer in layers)}  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    ones = {layer.name: 1e-3 * torch.randn(layer.shape, generator=draw) for layer in layers}
    step, weights = Direction(ones, 1.0, 1.0, {}), Weights(layers)
    weights.put(step, 50.0)
    assert any((layer.weight != before[layer.name]).any() for layer in layers)
    weights.put()
    assert all(torch.equal(layer.weight.float(), before[layer.name]) for layer in layers)
    weights.take(step, 1.0)
    weights.take(step, 2.0)
    for layer in layers:
        expected = (before[layer.name] + (ones[layer.name] + 2 * ones[layer.name])).bfloat16()
        assert torch.equal(layer.weight, expected)
    assert all(torch.equal(dict(model.named_parameters())[n], one) for n, one in others.items())


@pytest.mark.parametrize("full", [False, True], ids=["head", "logits"])
def test_distances_are_those_of_full_logits(llama, rows, full):
    """KL(start || changed) and loss, for rows one at a time with nothing but logits."""
    scorer = Scorer(None) if full else Scorer.for_model(llama)
    given = Rows(rows, batch_tokens=30)
    reference = Reference.of(llama, given, scorer)
    assert reference.kl(llama) == pytest.approx(0, abs=1e-12)
    places = [(row, t) for row in rows for t in range(len(row.labels) - 1)
              if row.labels[t + 1] != -100]  # fmt: skip

    @torch.no_grad()
    def log_probs():
        found = {row.row: llama(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
                 for row in rows}  # fmt: skip
        return torch.stack([found[row.row][t] for row, t in places])

    before = log_probs()
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.add_(0.3)
    after = log_probs()
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert reference.kl(llama) == pytest.approx(kl, rel=1e-6)
    labels = [row.labels[t + 1] for row, t in places]
    nll = -float(after[range(len(labels)), labels].mean())
    assert mean_nll(llama, given, Scorer.for_model(llama)) == pytest.approx(nll, rel=1e-6)


def test_rows_are_taken_at_equal_distances(fresh_rows):
    assert spaced(fresh_rows(10), 4) == [0, 2, 5, 7]
    assert spaced(fresh_rows(3), 9) == [0, 1, 2]
