"""Against the exact Gauss–Newton matrix of a block, worked out with autograd and no sampling.

Instead of drawing labels, these tests enumerate them: draw v of V goes back with √(V p_v)(p − e_v),
so the mean over draws of its outer product is Σ_v p_v (p − e_v)(p − e_v)ᵀ = diag p − ppᵀ.
"""

import math

import pytest
import torch

from unlearn.curvature import passes as passes_module
from unlearn.curvature.damping import Damping
from unlearn.curvature.fit import FitSettings, fit_curvature
from unlearn.curvature.labels import sample, uniforms
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.curvature.solve import inverse
from unlearn.data.encode import Example

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
VOCAB = 11
TOLERANCE = 1e-5
"""The norms of a Llama compute in float32, whatever its weights are."""
EVERY_LABEL = {"label_draws": VOCAB}


@pytest.fixture
def enumerated(monkeypatch):
    """Let every label take part with its probability; exact for rows of one loss position."""

    def parts(head, hidden, places, source):
        assert source.draws == VOCAB
        p = head.logits(hidden).softmax(-1)
        weights = (VOCAB * p).sqrt()
        each = [p - torch.eye(VOCAB, dtype=p.dtype)[v] for v in range(VOCAB)]
        return [(weights[:, v, None] * one @ head.linear.weight).detach()
                for v, one in enumerate(each)]  # fmt: skip

    monkeypatch.setattr(passes_module, "cotangents", parts)


def logits_of(model, row, name, change):
    """Give the logits at loss positions with one weight moved by ``change``, differentiably."""
    places = [t for t in range(len(row.labels) - 1) if row.labels[t + 1] != -100]
    weights = {f"{name}.weight": model.get_submodule(name).weight + change}
    given = {"input_ids": torch.tensor([row.input_ids]), "use_cache": False}
    return torch.func.functional_call(model, weights, kwargs=given).logits[0, places]


def exact_block(model, rows, name):
    """Give (1/N) Σ_s J_sᵀ (diag p_s − p_s p_sᵀ) J_s for one weight, as a matrix."""
    weight = model.get_submodule(name).weight
    total, count = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64), 0
    for row in rows:
        zero = torch.zeros_like(weight)
        jacobian = torch.autograd.functional.jacobian(
            lambda change, row=row: logits_of(model, row, name, change), zero
        ).flatten(2)
        for j, p in zip(jacobian, logits_of(model, row, name, zero).softmax(-1), strict=True):
            total += j.t() @ (p.diag() - p.outer(p)) @ j
            count += 1
    return (total / count).detach()


@pytest.fixture
def one_token_rows():
    """Rows of the same first token, which alone predicts: no position is shared."""
    return [Example([3, n], [-100, n], 1, n) for n in range(2)]


def test_kfac_is_exact_where_there_is_one_input_and_no_sharing(llama, one_token_rows, enumerated):
    """One activation and one distribution: H = G ⊗ A, for every layer; q and k change nothing."""
    layers = find_layers(llama, "all-linear")
    settings = FitSettings(**EVERY_LABEL)
    found = fit_curvature(llama, Rows(one_token_rows), layers, settings)
    draw = torch.Generator().manual_seed(0)
    for layer in layers:
        exact = exact_block(llama, one_token_rows, layer.name)
        if layer.name.endswith(("q_proj", "k_proj")):
            assert exact.abs().max() < 1e-12
            continue
        operator = inverse(found.layers[layer.name], Damping("relative", 1e-3))
        change = torch.randn(layer.shape, generator=draw, dtype=torch.float64)
        product = (exact @ change.flatten()).view(layer.shape)
        error = (operator.product(change) - product).norm() / product.norm()
        assert error < TOLERANCE, layer.name


def test_eigenvalues_are_the_diagonal_of_the_exact_block(llama, fresh_rows, enumerated):
    """With prompts, so that positions of one weight share it: per token it would be another sum.

    In block 0 attention carries the loss of one position to all before it.
    """
    rows = fresh_rows(3, labelled=1)
    layers = find_layers(llama, "mlp")
    found = fit_curvature(llama, Rows(rows), layers, FitSettings("ekfac", **EVERY_LABEL))
    whole = fit_curvature(llama, Rows(rows), layers, FitSettings("tkfac", **EVERY_LABEL))
    product_traces = {}
    for layer in layers:
        exact = exact_block(llama, rows, layer.name)
        one = found.layers[layer.name]
        basis = torch.kron(one.output_basis.dense(), one.input_basis.dense())
        expected = (basis.t() @ exact @ basis).diagonal().view(layer.shape)
        error = (one.eigenvalues - expected).norm() / expected.norm()
        assert error < TOLERANCE, layer.name
        factors = whole.layers[layer.name]
        assert factors.trace == pytest.approx(float(exact.trace()), rel=TOLERANCE)
        product = factors.inputs.trace() * factors.outputs.trace()
        product_traces[layer.name] = product / float(exact.trace())
        corrected = inverse(factors, Damping("relative", 1e-3)).eigenvalues.sum()
        assert float(corrected) == pytest.approx(float(exact.trace()), rel=TOLERANCE)
    assert abs(math.log(product_traces["model.layers.0.mlp.down_proj"])) > 0.05


def test_curvature_is_the_second_derivative_of_the_kl(llama, one_token_rows, enumerated):
    """KL(θ || θ + εv) / (½ε² vᵀHv) goes to 1 as ε goes to 0, linearly at worst."""
    layers = find_layers(llama, "mlp")
    found = fit_curvature(llama, Rows(one_token_rows), layers, FitSettings(**EVERY_LABEL))
    name = "model.layers.0.mlp.up_proj"
    change = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    operator = inverse(found.layers[name], Damping("relative", 1e-3))
    bend = float((change * operator.product(change)).sum())
    off = []
    for step in (1e-1, 1e-2, 1e-3):
        kl = 0.0
        for row in one_token_rows[:1]:  # they all say the same
            before = logits_of(llama, row, name, 0 * change).log_softmax(-1).detach()
            after = logits_of(llama, row, name, step * change).log_softmax(-1).detach()
            kl += float((before.exp() * (before - after)).sum())
        off.append(abs(kl / (0.5 * step**2 * bend) - 1))
    assert off[0] < 0.5
    assert off[1] < 0.2 * off[0]
    assert off[2] < 1e-2


def test_drawn_labels_have_the_models_probabilities():
    """χ² of 20,000 draws over 5 tokens: above 18.5 one time in a thousand (4 degrees)."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.09, 0.01], dtype=torch.float64)
    number = 20_000
    at = uniforms(7, 0, 0, torch.arange(number) // 100, torch.arange(number) % 100)
    counts = sample(p.expand(number, 5), at).bincount(minlength=5).double()
    assert float(((counts - number * p) ** 2 / (number * p)).sum()) < 18.5


def test_numbers_are_a_function_of_seed_pass_draw_row_and_position():
    rows, positions = torch.tensor([0, 1, 5, 5]), torch.tensor([3, 3, 0, 1])
    first = uniforms(1, 0, 0, rows, positions)
    assert torch.equal(uniforms(1, 0, 0, rows.flip(0), positions.flip(0)).flip(0), first)
    others = [uniforms(2, 0, 0, rows, positions), uniforms(1, 1, 0, rows, positions),
              uniforms(1, 0, 1, rows, positions)]  # fmt: skip
    values = torch.cat([first, *others])
    assert len(values.unique()) == len(values)
    assert bool(((values > 0) & (values < 1)).all())


def test_a_token_of_probability_zero_is_never_drawn():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    at = torch.tensor([1e-12, 0.4999, 0.5001, 1 - 1e-12])
    assert sample(p.expand(4, 5), at).tolist() == [1, 1, 3, 3]
