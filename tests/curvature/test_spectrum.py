"""Spectra: by hand, against dense matrices, and against what the solver really inverts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.curvature.blocks import Blocks
from unlearn.curvature.damping import Damping
from unlearn.curvature.factors import Counts, LayerCurvature
from unlearn.curvature.fit import Curvature, FitSettings, fit_curvature
from unlearn.curvature.layers import find_layers
from unlearn.curvature.passes import Rows
from unlearn.curvature.solve import inverse
from unlearn.curvature.spectrum import Spectrum, spectra, totals
from unlearn.curvature.storage import save_curvature

pytestmark = pytest.mark.filterwarnings("ignore:.*loss tokens for factors")


def blocks(*parts):
    return Blocks(tuple(torch.as_tensor(part, dtype=torch.float64) for part in parts))


def only(layer, damping="factored:0.25"):
    (found,) = spectra(Curvature({"a": layer}, Counts(), {}), Damping.parse(damping))
    return found


A, G = [[2.0, 1.0], [1.0, 2.0]], [[3.0, -1.0], [-1.0, 3.0]]
"""Eigenvalues 1 and 3, 2 and 4; their products 2, 4, 6 and 12."""


def test_two_by_two_factors_by_hand():
    """√0.25·mean(A) = 1 is added to A, 1.5 to G: (2, 4) times (3.5, 5.5) is 7, 11, 14, 22."""
    found = only(LayerCurvature("a", blocks(A), blocks(G)))
    assert (found.kind, found.shape) == ("kfac", (2, 2))
    assert (found.inputs_trace, found.outputs_trace, found.trace) == (4, 6, 24)
    ends = found.eigenvalues
    assert (ends.largest, ends.median, ends.smallest) == pytest.approx((12, 4, 2))
    assert (ends.condition, ends.condition_to_median) == pytest.approx((6, 3))
    assert found.effective_rank == pytest.approx(24**2 / (4 + 16 + 36 + 144))
    ends = found.damped
    assert (ends.largest, ends.median, ends.smallest) == pytest.approx((22, 11, 7))
    assert found.damping == pytest.approx(0.25 * 2 * 3)
    assert found.damping_to_median == pytest.approx(1.5 / 4)
    assert found.curves["A"].values == pytest.approx((3, 1))
    assert (found.curves["G"].ranks, found.curves["G"].mean) == ((1, 2), pytest.approx(3))
    assert found.bytes == 2 * 4 * 8


@pytest.mark.parametrize(("damping", "amount"), [("relative:0.5", 3.0), ("absolute:0.1", 0.1)])
def test_other_damping_is_added_to_every_product(damping, amount):
    ends = only(LayerCurvature("a", blocks(A), blocks(G)), damping).damped
    expected = (12 + amount, 4 + amount, 2 + amount)
    assert (ends.largest, ends.median, ends.smallest) == pytest.approx(expected)


def test_a_corrected_trace_scales_every_eigenvalue():
    found = only(LayerCurvature("a", blocks(A), blocks(G), trace=12.0))
    assert (found.kind, found.trace, found.damping) == ("tkfac", 12, pytest.approx(0.75))
    assert found.eigenvalues.largest == pytest.approx(6)
    assert found.damped.largest == pytest.approx(11)
    assert found.effective_rank == pytest.approx(2.88)


def test_measured_eigenvalues_are_taken_as_they_are():
    values = torch.tensor([[4.0, 0.0, 1.0], [3.0, 2.0, 8.0]])
    found = only(LayerCurvature("a", eigenvalues=values), "factored:0.5")
    assert (found.kind, found.shape, found.trace) == ("diag", (2, 3), 18)
    assert (found.inputs_trace, found.outputs_trace) == (None, None)
    assert (found.eigenvalues.median, found.damped.smallest) == (2, 1.5)
    assert found.eigenvalues.condition == math.inf
    assert found.curves["H"].values == (8, 4, 3, 2, 1, 0)


def test_inputs_alone_have_no_share_of_a_trace():
    found = only(LayerCurvature("a", blocks(A)), "relative:0.5")
    assert (found.kind, found.shape, found.trace) == ("act", (None, 2), None)
    assert (found.eigenvalues.largest, found.damped.largest) == pytest.approx((3, 4))


def test_a_layer_without_curvature_has_no_condition():
    found = only(LayerCurvature("a", blocks(A), blocks([[0.0]]), trace=0.0))
    assert (found.trace, found.effective_rank, found.damping) == (0, 0, 0)
    assert math.isnan(found.eigenvalues.condition)
    assert math.isnan(found.damping_to_median)


numbers = st.lists(st.floats(0, 1e6), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(numbers, numbers, st.floats(0, 10))
def test_products_need_not_be_formed(inputs, outputs, added):
    """Ends, middle, sum and effective rank are those of all products, zeros among them or not."""
    double = torch.float64
    first, second = (torch.tensor(values, dtype=double) for values in (inputs, outputs))
    ours, all_of_them = Spectrum.of(first, second), (second[:, None] * first).flatten() + added
    ours = Spectrum(ours.inputs, ours.outputs, added)
    assert len(ours) == len(all_of_them)
    close = {"rel": 1e-9, "abs": 1e-300}
    assert ours.largest == pytest.approx(float(all_of_them.max()), **close)
    assert ours.smallest == pytest.approx(float(all_of_them.min()), **close)
    assert ours.median == pytest.approx(float(all_of_them.median()), **close)
    assert ours.sum == pytest.approx(float(all_of_them.sum()), **close)
    squares = float(all_of_them.square().sum())
    if squares > 1e-200:  # below, squares are lost to underflow on both sides
        rank = float(all_of_them.sum()) ** 2 / squares
        assert ours.effective_rank == pytest.approx(rank, rel=1e-9)


@pytest.mark.parametrize("damping", ["factored:1e-2", "relative:0.1", "absolute:1e-4"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "tkfac", "act", "diag"])
def test_it_is_the_spectrum_of_what_the_solver_inverts(llama, rows, kind, damping):
    """The dense matrix of a layer, column by column from the solver, with factors cut in two."""
    layers, how = find_layers(llama), Damping.parse(damping)
    fitted = fit_curvature(llama, Rows(rows), layers, FitSettings(kind, max_factor_dim=7))
    found = {one.name: one for one in spectra(fitted, how)}
    for layer in (layers[0], layers[-1]):
        one, operator = found[layer.name], inverse(fitted.layers[layer.name], how)
        units = torch.eye(layer.weight.numel(), dtype=torch.float64).view(-1, *layer.shape)
        for act, ends in ((operator.product, one.eigenvalues), (operator.damped, one.damped)):
            if kind == "act" and act == operator.product:
                continue
            dense = torch.stack([act(unit).flatten() for unit in units])
            values = torch.linalg.eigvalsh((dense + dense.t()) / 2)
            largest = float(values[-1])
            assert ends.largest == pytest.approx(largest)
            assert ends.median == pytest.approx(float(values.median()), abs=1e-12 * largest)
            assert ends.smallest == pytest.approx(float(values[0]), abs=1e-12 * largest)
            if act == operator.product:
                assert one.trace == pytest.approx(float(values.sum()))
                rank = float(values.sum()) ** 2 / float(values.square().sum())
                assert one.effective_rank == pytest.approx(rank)
        assert one.damping == pytest.approx(operator.damping)
        assert one.shape == ((None, layer.shape[1]) if kind == "act" else layer.shape)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diag"])
def test_bytes_are_those_of_the_file_and_shared_factors_count_once(llama, rows, tmp_path, kind):
    fitted = fit_curvature(llama, Rows(rows), find_layers(llama), FitSettings(kind))
    save_curvature(fitted, tmp_path / "f")
    size = (tmp_path / "f").stat().st_size
    head = int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")
    assert sum(one.bytes for one in totals(fitted)) == size - 8 - head
