"""What is differentiated at the vocabulary head: drawn labels, unlikelihood, the KL itself."""

import copy

import pytest
import torch
from torch import nn

from unlearn.curvature.distance import Reference
from unlearn.curvature.fit import gradient, kl_gradient
from unlearn.curvature.labels import LabelSource, Places, cotangents
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.head import VocabularyHead
from unlearn.scores import Scorer


def at_logits(logits, source, number):
    """Give what reaches the logits of one position, drawn at ``number`` places."""
    vocabulary = logits.shape[-1]
    places = Places(torch.zeros(number).long(), torch.arange(number), torch.zeros(number).long())
    head = VocabularyHead(nn.Identity(), vocabulary)
    return cotangents(head, logits.expand(number, vocabulary), places, source)[0]


@pytest.mark.parametrize("fisher", ["importance", "mc"])
def test_drawn_gradients_have_the_fisher_matrix_as_second_moment(fisher):
    """diag(p) - p p^T; 40,000 draws, within 5 standard errors of each entry."""
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0, -3.0], dtype=torch.float64)
    found = at_logits(logits, LabelSource(fisher), 40_000)
    p = logits.softmax(-1)
    outer = found[:, :, None] * found[:, None]
    error = outer.std(0) / len(found) ** 0.5
    assert ((outer.mean(0) - (p.diag() - torch.outer(p, p))).abs() < 5 * error + 1e-12).all()
    assert (found.mean(0).abs() < 5 * found.std(0) / len(found) ** 0.5).all()


def test_every_important_draw_is_of_one_length():
    """Its square is 1 - sum of p squared, the trace of the Fisher matrix, where p is near 1 too.

    With p = (1 - 3e-4, 1e-4, 1e-4, 1e-4) a plain draw is the first token in 9,997 of 10,000 cases.
    """
    p = torch.tensor([1 - 3e-4, 1e-4, 1e-4, 1e-4], dtype=torch.float64)
    found = at_logits(p.log(), LabelSource("importance"), 200)
    lengths = found.square().sum(-1)
    torch.testing.assert_close(lengths, (1 - p.square().sum()).expand(200), rtol=1e-9, atol=0)
    assert (found[:, 1:].abs().argmax(-1).unique(return_counts=True)[1] > 30).all()
    plain = at_logits(p.log(), LabelSource("mc"), 200)
    assert plain.square().sum(-1).median() < 1e-6


def test_an_important_draw_in_float32_is_finite_where_p_rounds_to_1():
    found = at_logits(torch.tensor([60.0, 0.0, 0.0]), LabelSource("importance"), 50)
    assert found.isfinite().all()
    assert found.norm(dim=-1).max() < 1e-6


def test_unlikelihood_is_the_gradient_of_log_of_one_minus_p():
    """Against autograd; and bounded where p rounds to 1, though log(1 - p) is infinite there."""
    logits = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    (1 - logits.softmax(-1)[0]).log().backward()
    found = at_logits(logits.detach(), LabelSource("empirical", ascend="unlikelihood"), 1)[0]
    torch.testing.assert_close(found, logits.grad)
    extreme = at_logits(torch.tensor([90.0, 1.0, 1.0]),
                        LabelSource("empirical", ascend="unlikelihood"), 1)[0]  # fmt: skip
    torch.testing.assert_close(extreme, torch.tensor([-1.0, 0.5, 0.5]))


def test_the_gradient_of_the_kl_is_that_of_full_logits(any_model, rows):
    """Per labelled token, for every tracked weight; 0 where nothing has changed."""
    layers = find_layers(any_model, "all-linear")
    start = copy.deepcopy(any_model)
    reference = Reference.of(any_model, Rows(rows, batch_tokens=30), Scorer.for_model(any_model))
    still = kl_gradient(any_model, reference, layers)
    assert max(float(one.abs().max()) for one in still.weights.values()) < 1e-12
    with torch.no_grad():
        for layer in layers:
            layer.weight.add_(0.1 * torch.randn(layer.shape, dtype=torch.float64))
    found = kl_gradient(any_model, reference, layers)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        there = [t for t in range(len(row.labels) - 1) if row.labels[t + 1] != -100]
        p = start(input_ids=ids).logits[0, there].log_softmax(-1).detach()
        q = any_model(input_ids=ids).logits[0, there].log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum()
        count += len(there)
    weights = [layer.module.weight for layer in layers]
    expected = torch.autograd.grad(total, weights)  # norms work in fp32: divided afterwards
    assert found.num_labels == count
    for layer, one in zip(layers, expected, strict=True):
        torch.testing.assert_close(
            found.weights[layer.name], layer.laid_out(one) / count, rtol=1e-8, atol=1e-11
        )


def test_the_gradient_of_unlikelihood_is_that_of_full_logits(llama, rows):
    layers = find_layers(llama)
    found = gradient(llama, Rows(rows, batch_tokens=30), layers, ascend="unlikelihood")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = llama(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        p = logits.softmax(-1)[range(len(labels)), labels.clamp_min(0)]
        total = total + (1 - p).log()[labels != -100].sum()
        count += int((labels != -100).sum())
    expected = torch.autograd.grad(total, [layer.module.weight for layer in layers])
    for layer, one in zip(layers, expected, strict=True):
        torch.testing.assert_close(found.weights[layer.name], one / count, rtol=1e-8, atol=1e-11)
