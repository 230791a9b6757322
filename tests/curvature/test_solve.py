"""Damped solves against dense ones, and what a step is predicted to do."""

import dataclasses

import pytest
import torch

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.damping import Damping
from unlearn.curvature.direction import direction
from unlearn.curvature.factors import LayerCurvature
from unlearn.curvature.fit import FitSettings, fit_curvature, gradient
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.curvature.sharing import owners
from unlearn.curvature.solve import (
    inverse,
    mean_eigenvalue,
    positive,
    residual,
    trimmed_mean,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")
EXACT = {"rtol": 1e-8, "atol": 1e-10}
OUT, IN = 4, 6


def gram(size, rank, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, size, generator=draw, dtype=torch.float64)
    return (rows.t() @ rows / rank).to(dtype)


def random_grad(dtype=torch.float64):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9)).to(dtype)


def factors(rank=20, dtype=torch.float64, **changes):
    found = LayerCurvature("a", Blocks((gram(IN, rank, 1, dtype),)),
                           Blocks((gram(OUT, rank, 2, dtype),)))  # fmt: skip
    return dataclasses.replace(found, **changes)


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def dense_solve(matrix, grad):
    return torch.linalg.solve(matrix, grad.double().flatten()).view(OUT, IN)


def test_factored_damping_is_added_to_each_factor():
    """π√λ = √c·mean(A), √λ/π = √c·mean(G): with c = 0.01 a tenth of each mean."""
    layer, grad = factors(), random_grad()
    a, g = layer.inputs.dense(), layer.outputs.dense()
    to_a, to_g = 0.1 * float(a.trace()) / IN, 0.1 * float(g.trace()) / OUT
    matrix = torch.kron(g + to_g * eye(OUT), a + to_a * eye(IN))
    operator = inverse(layer, Damping("factored", 0.01))
    torch.testing.assert_close(operator.solve(grad), dense_solve(matrix, grad), **EXACT)
    assert operator.damping == pytest.approx(to_a * to_g)
    undamped = (torch.kron(g, a) @ grad.flatten()).view(OUT, IN)
    torch.testing.assert_close(operator.product(grad), undamped, **EXACT)
    assert operator.bend(grad) == pytest.approx(float((grad * undamped).sum()), rel=1e-9)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_scalar_damping_is_added_to_the_eigenvalues(kind):
    layer, grad = factors(), random_grad()
    matrix = torch.kron(layer.outputs.dense(), layer.inputs.dense())
    amount = 0.1 if kind == "absolute" else 0.1 * float(matrix.trace()) / (IN * OUT)
    operator = inverse(layer, Damping(kind, 0.1))
    expected = dense_solve(matrix + amount * eye(IN * OUT), grad)
    torch.testing.assert_close(operator.solve(grad), expected, **EXACT)


def test_a_measured_trace_scales_the_product():
    """τ = tr(H) / (tr A tr G); twice the trace is twice the curvature, in either damping."""
    plain, grad = factors(), random_grad()
    double = factors(trace=2 * plain.inputs.trace() * plain.outputs.trace())
    for damping in (Damping("factored", 0.01), Damping("relative", 0.01)):
        ours, theirs = inverse(double, damping), inverse(plain, damping)
        torch.testing.assert_close(ours.product(grad), 2 * theirs.product(grad), **EXACT)
        torch.testing.assert_close(ours.solve(grad), theirs.solve(grad) / 2, **EXACT)


def test_inputs_alone_precondition_from_the_right():
    layer, grad = factors(outputs=None), random_grad()
    a = layer.inputs.dense()
    expected = grad @ torch.linalg.inv(a + 0.05 * float(a.trace()) / IN * eye(IN))
    operator = inverse(layer, Damping("relative", 0.05))
    torch.testing.assert_close(operator.solve(grad), expected, **EXACT)


def test_blocks_are_solved_one_by_one():
    """Of a block-diagonal factor the dense inverse is block-diagonal too."""
    cut = Blocks((gram(2, 9, 3), gram(4, 9, 4)))
    layer, grad = factors(inputs=cut), random_grad()
    whole = factors(inputs=Blocks((cut.dense(),)))
    for damping in (Damping("factored", 1e-2), Damping("relative", 1e-2)):
        ours, theirs = (inverse(one, damping).solve(grad) for one in (layer, whole))
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("text", ["factored:1e-3", "relative:1e-2", "absolute:1e-3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_factors_are_solved(text, dtype):
    """One row and two: rank 1 and 2 of 6 and 4 dimensions."""
    layer, grad = factors(rank=1, dtype=dtype), random_grad(dtype)
    operator = inverse(layer, Damping.parse(text))
    found = operator.solve(grad)
    assert residual(operator, found, grad) < 1e-3
    assert found.dtype == dtype


def test_what_is_not_positive_gets_more_damping_and_a_warning():
    """Eigenvalues 1 and −0.02: 0.001 is too little, and so is 0.01; 0.1 is not."""
    with pytest.warns(UserWarning, match="multiplied by 100"):
        damped, roots = positive(Blocks((torch.diag(torch.tensor([1.0, -0.02])),)), 1e-3)
    torch.testing.assert_close(damped.dense(), torch.diag(torch.tensor([1.1, 0.08])))
    torch.testing.assert_close(roots.dense() @ roots.dense().t(), damped.dense())


def test_an_ill_conditioned_system_in_float32_is_solved_in_float64():
    """A condition number of 1e7: in float32 alone the solution is off, refined or not."""
    turn = torch.linalg.qr(gram(IN, 9, 5, torch.float32))[0]
    wide = turn @ torch.diag(torch.logspace(0, -7, IN)) @ turn.t()
    layer, grad = factors(dtype=torch.float32, inputs=Blocks((wide,))), random_grad(torch.float32)
    operator = inverse(layer, Damping("factored", 1e-13))
    sides = (operator.damped_outputs, operator.damped_inputs)
    exact = dense_solve(torch.kron(*(one.dense().double() for one in sides)), grad)
    errors = [float((one - exact).norm() / exact.norm())
              for one in (operator._once(grad), operator.solve(grad))]  # fmt: skip
    assert errors[0] > 1e-2
    assert errors[1] < 1e-4


def test_a_layer_without_curvature_is_left_alone():
    layer = factors(outputs=Blocks((torch.zeros(OUT, OUT, dtype=torch.float64),)))
    with pytest.warns(UserWarning, match="no curvature"):
        found = inverse(layer, Damping("factored", 1e-3)).solve(random_grad())
    assert not found.any()


@pytest.mark.parametrize(
    ("kind", "text"),
    [("kfac", "factored:1e-3"), ("kfac", "relative:0.1"), ("ekfac", "relative:1e-2"),
     ("tkfac", "factored:1e-2"), ("diag", "relative:0.1"), ("act", "relative:1e-2")],
)  # fmt: skip
def test_a_step_is_charged_half_of_its_gain(llama, rows, fresh_rows, kind, text):
    """½ δᵀ(H + λI)δ = (α/2) gᵀδ, because (H + λI)δ = αg."""
    layers, alpha = find_layers(llama, "all-linear"), 0.03
    curvature = fit_curvature(llama, Rows(fresh_rows(12, seed=3)), layers, FitSettings(kind))
    grad, damping = gradient(llama, Rows(rows), layers), Damping.parse(text)
    found = direction(curvature, grad, damping)
    charged = undamped = 0.0
    for name, layer in curvature.layers.items():
        operator, change = inverse(layer, damping), alpha * found.weights[name]
        charged += 0.5 * float((change * operator.damped(change)).sum())
        undamped += 0.5 * float((change * operator.product(change)).sum())
        assert found.dampings[name] == pytest.approx(operator.damping)
    assert found.damped_kl(alpha) == pytest.approx(charged, rel=1e-9)
    assert found.gain(alpha) == pytest.approx(2 * charged / alpha, rel=1e-9)
    if kind == "act":
        assert found.kl(alpha) is None
    else:
        assert found.kl(alpha) == pytest.approx(undamped, rel=1e-9)
        assert found.kl(alpha) < found.damped_kl(alpha)
        assert found.kl(found.trust_region(0.02)) == pytest.approx(0.02)


def test_owners_share_the_work():
    """Costs 8, 5, 4, 3 for two: 8 + 3 against 5 + 4."""
    dealt = owners({"a": 8.0, "b": 5.0, "c": 4.0, "d": 3.0}, 2)
    assert dealt == {"a": 0, "b": 1, "c": 1, "d": 0}


@pytest.mark.parametrize("text", ["factored", "factored:0", "relative:-1", "other:1", "absolute:x"])
def test_a_damping_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="must be KIND:C"):
        Damping.parse(text)
    assert str(Damping.parse("relative:0.1")) == "relative:0.1"


def test_trimmed_means_leave_out_the_largest_eigenvalues():
    """Of 100, 4, 3, 2 and 1 without the largest the mean is 2.5; without all but one it is 1."""
    spectrum = torch.tensor([100.0, 4, 3, 2, 1], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    part = basis @ spectrum.diag() @ basis.t()
    whole, halves = Blocks((part,)), Blocks((spectrum[:2].diag(), spectrum[2:].diag()))
    for factor in (whole, halves):
        found = [mean_eigenvalue(factor, trim) for trim in (0, 1, 2, 9)]
        assert found == pytest.approx([22.0, 2.5, 2.0, 1.0])
    assert [trimmed_mean(spectrum, trim) for trim in (0, 1, 9)] == pytest.approx([22.0, 2.5, 1.0])


@pytest.mark.parametrize("kind", ["kfac", "act", "diag"])
def test_damping_is_a_share_of_the_trimmed_mean(kind):
    layer = factors()
    if kind == "act":
        layer = dataclasses.replace(layer, outputs=None)
    if kind == "diag":
        layer = LayerCurvature("a", eigenvalues=torch.tensor([[9.0, 1, 2], [3, 2, 1]]))
    plain, trimmed = (inverse(layer, Damping.parse("relative:0.1", trim)) for trim in (0, 1))
    expected = {
        "kfac": lambda: 0.1 * mean_eigenvalue(layer.inputs, 1) * mean_eigenvalue(layer.outputs, 1),
        "act": lambda: 0.1 * mean_eigenvalue(layer.inputs, 1),
        "diag": lambda: 0.1 * 9 / 5,
    }[kind]()
    assert trimmed.damping == pytest.approx(expected, rel=1e-6)
    assert trimmed.damping < plain.damping
